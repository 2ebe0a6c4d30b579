{#
Two-sided 95 % intervals, in plain SQL.

Rates get the exact (Clopper-Pearson) interval. Its lower end is the p at which `hits` or more of `trials` has
probability 0.025; forty halvings find it to 1e-12. The upper end is the lower end of the misses, mirrored.

Means of values between 0 and 1 get the Wilson interval of a rate with the same mean and n. No such value varies
more than a coin of its mean, so this errs on the wide side, and it does not shrink to nothing when all values agree.

`prediction_bound` is the one-sided 95 % bound for one more value of nulls, as diffing_core/agents/calibration.py has it:
mean + t(0.95, n - 1) sd sqrt(1 + 1 / n), the spread never below 0.03, null below three values. The list holds
t(0.95, 2), t(0.95, 3) …; beyond 30 degrees of freedom the last is taken, at most 0.06 too large.
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

{% macro prediction_bound(values) %}
case
    when count({{ values }}) >= 3 then avg({{ values }})
        + greatest(stddev_samp({{ values }}), 0.03) * sqrt(1 + 1 / count({{ values }}))
        * [
            2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125, 1.7959,
            1.7823, 1.7709, 1.7613, 1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247, 1.7207,
            1.7171, 1.7139, 1.7109, 1.7081, 1.7056, 1.7033, 1.7011, 1.6991, 1.6973
        ][least(count({{ values }}) - 2, 29)]
end
{% endmacro %}
