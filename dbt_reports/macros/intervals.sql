{#
Rates with their two-sided 95 % intervals; the functions are those of functions.py.

exact_rate: of independent trials, the exact (Clopper-Pearson) interval. clustered_rate: of trials that depend on each
other within a cluster, the bootstrap interval over clusters; where all trials agree it has no width, whatever their number.

 `prediction_bound` is the one-sided 95 % bound for one more value of nulls, as diffing_core/agents/calibration.py has it:
 mean + t(0.95, n - 1) sd sqrt(1 + 1 / n), the spread never below 0.03, null below three values. The list holds
 t(0.95, 2), t(0.95, 3) …; beyond 30 degrees of freedom the last is taken, at most 0.06 too large.
#}

{% macro exact_rate(hits, trials, name) %}
{{ hits }} / nullif({{ trials }}, 0) as {{ name }}_rate,
clopper_pearson({{ hits }}, nullif({{ trials }}, 0)).low as {{ name }}_low,
clopper_pearson({{ hits }}, nullif({{ trials }}, 0)).high as {{ name }}_high
{% endmacro %}

{% macro clustered_rate(hits, trials, clusters, values, name) %}
{{ hits }} / nullif({{ trials }}, 0) as {{ name }}_rate,
cluster_mean({{ clusters }}, {{ values }}).low as {{ name }}_low,
cluster_mean({{ clusters }}, {{ values }}).high as {{ name }}_high
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
