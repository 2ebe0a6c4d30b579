{# One row per combination of these columns, none of which is null. #}
{% test grain(model, columns) %}
select {{ columns | join(', ') }}
from {{ model }}
group by {{ columns | join(', ') }}
having count(*) > 1 or not ({{ columns | join(' is not null and ') }} is not null)
{% endtest %}
