{#
Rates with their two-sided 95 % intervals; the functions are those of functions.py.

exact_rate: of independent trials, the exact (Clopper-Pearson) interval. clustered_rate: of trials that depend on each
other within a cluster, the bootstrap interval over clusters; where all trials agree it has no width, whatever their number.
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
