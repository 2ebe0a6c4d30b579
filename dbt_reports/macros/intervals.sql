{#
Two-sided 95 % intervals, in plain SQL.

Rates get the exact (Clopper-Pearson) interval. Its lower end is the p at which `hits` or more of `trials` has
probability 0.025; forty halvings find it to 1e-12. The upper end is the lower end of the misses, mirrored.

Means of values between 0 and 1 get the Wilson interval of a rate with the same mean and n. No such value varies
more than a coin of its mean, so this errs on the wide side, and it does not shrink to nothing when all values agree.
#}

{% macro exact_low(hits, trials) %}
case
    when {{ trials }} > 0 then list_reduce(
        list_transform(range(1, 41), halving -> 0.5 ** halving),
        (low, step) -> case
            when list_sum(list_transform(range({{ hits }}, {{ trials }} + 1), k -> exp(
                lgamma({{ trials }} + 1) - lgamma(k + 1) - lgamma({{ trials }} - k + 1)
                + k * ln(low + step) + ({{ trials }} - k) * ln(1 - low - step)
            ))) < 0.025 then low + step
            else low
        end,
        0.0::double
    )
end
{% endmacro %}

{% macro exact_rate(hits, trials, name) %}
{{ hits }} / nullif({{ trials }}, 0) as {{ name }}_rate,
{{ exact_low(hits, trials) }} as {{ name }}_low,
1 - {{ exact_low('(' ~ trials ~ ' - ' ~ hits ~ ')', trials) }} as {{ name }}_high
{% endmacro %}

{% macro wilson(mean, n, sign) %}
(
    ({{ mean }}) + 1.96 ** 2 / (2 * {{ n }})
    {{ sign }} 1.96 * sqrt(({{ mean }}) * (1 - ({{ mean }})) / {{ n }} + 1.96 ** 2 / (4 * {{ n }} ** 2))
) / (1 + 1.96 ** 2 / {{ n }})
{% endmacro %}
