{# Null where there is no trial, otherwise low <= value <= high within the bounds. #}
{% test ordered_interval(model, value, low, high, least=0, most=1) %}
select *
from {{ model }}
where
    not coalesce({{ least }} <= {{ low }} and {{ low }} <= {{ value }} + 1e-9
        and {{ value }} - 1e-9 <= {{ high }} and {{ high }} <= {{ most }}, {{ value }} is null)
{% endtest %}
