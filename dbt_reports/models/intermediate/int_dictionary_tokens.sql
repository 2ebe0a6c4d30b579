with

-- what a latent adds to the difference, times how likely it makes the token
crosscoder_tokens as (
    select
        tokens.run_id,
        tokens.layer,
        token_id,
        token,
        sum(difference_rms * probability) as weight,
    from {{ ref('stg_crosscoder_tokens') }} as tokens
    inner join {{ ref('stg_crosscoder_latents') }} as latents using (run_id, layer, latent)
    where head = 'tuned' and direction = 'promoted'
    group by tokens.run_id, tokens.layer, token_id, token
),

tokens as (
    select run_id, layer, token_id, token, score as weight from {{ ref('stg_sae_diff_tokens') }}
    union all
    select run_id, layer, token_id, token, weight from crosscoder_tokens
    union all
    select run_id, layer, token_id, token, weight from {{ ref('stg_itda_tokens') }}
),

placed as (
    select
        *,
        row_number() over (partition by run_id, layer order by weight desc, token_id) as place,
    from tokens
)

select * from placed
