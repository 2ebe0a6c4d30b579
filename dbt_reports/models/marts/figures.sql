with

points as (select * from {{ ref('int_figure_points') }}),

current_runs as (select run_id from {{ ref('int_current_runs') }} where step = 'diff'),

organisms as (select organism, model, variant, label from {{ ref('stg_organisms') }}),

sized as (
    select
        *,
        max(abs(value)) over (partition by run_id, figure, if(kind = 'bar', x, series)) as size,
    from points
    where run_id in (select run_id from current_runs)
),

ranked as (
    select
        *,
        dense_rank() over (partition by run_id, figure order by size desc, if(kind = 'bar', x, series)) as place,
    from sized
),

figures as (
    select
        organism,
        model,
        variant,
        label,
        corpus,
        method,
        figure,
        kind,
        title,
        x_title,
        value_title,
        series_title,
        is_log,
        x,
        x_number,
        series,
        value,
    from ranked
    inner join organisms using (organism, model, variant)
    where place <= most
)

select * from figures
