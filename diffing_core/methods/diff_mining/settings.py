"""Settings of `diff_mining`."""

from typing import Literal

from pydantic import Field

from diffing_core.settings import Settings

IDENTITY_PROMPT = "man -> man\n1135 -> 1135\nhello -> hello\n?"


class DiffMiningSettings(Settings):
    """Knobs of `diff_mining`."""

    source: Literal["logits", "logit_lens", "patchscope_lens"] = Field(
        "logits", description="What predicts: the models, norm and head of an earlier layer, or a patched prompt."
    )
    lens_layer: int | float = Field(0.75, ge=0, description="Block that both lenses read; a fraction is of the depth.")
    patchscope_tokens: int = Field(512, ge=1, description="About this many tokens are patched, a forward each.")
    patchscope_prompt: str = Field(IDENTITY_PROMPT, min_length=1, description="Its last token is patched and read.")
    difference: Literal["log_prob", "centred", "raw"] = Field(
        "log_prob",
        description="d: of log-probabilities, of logits less their mean over V, or of raw logits, whose arbitrary "
        "offset per position decides signs and means (the K largest are the same for all three).",
    )
    top_k: int = Field(100, ge=1, description="Tokens at each end of a position's differences; at most V/2.")
    answer_positions: int | None = Field(
        None, ge=1, description="In chats, count only this many positions from the answer's first; none counts all."
    )
    before_answer: int = Field(3, ge=0, description="Positions before the answer that go with those.")
    listed: int = Field(100, ge=1, description="Tokens per ordering.")
    whole_vocabulary: bool = Field(False, description="Write every vocabulary entry, not only listed ones.")
    readable_only: bool = Field(True, description="Leave special, broken and blank tokens out of all lists.")
    drop_punctuation: bool = Field(True, description="Leave tokens of nothing but punctuation out of all lists.")
    merge_variants: bool = Field(False, description="List tokens that differ in case or outer spaces as one.")
    min_probability: float = Field(
        1e-6, ge=0, le=1, description="Leave out tokens whose mean probability is below this in both models."
    )
    prior_weight: float = Field(1.0, gt=0, description="Prior documents per observed one in the log-odds.")
    min_documents: int = Field(5, ge=1, description="Documents that must raise or lower a token for it to be tested.")
    topics: int = Field(3, ge=0, description="NMF topics; 0 turns them off.")
    topic_tokens: int = Field(200, ge=1, description="Tokens per topic's list.")
    topic_words: int = Field(10, ge=1, description="Words that stand for a topic.")
    nmf_positions: int = Field(8192, ge=1, description="Positions that the topics are fitted to.")
    nmf_entries: Literal["magnitude", "binary"] = Field("magnitude", description="Entries: max(d, 0), or 1.")
    nmf_loss: Literal["frobenius", "kullback-leibler"] = Field("frobenius", description="Divergence of the NMF.")
    nmf_iterations: int = Field(200, ge=1, description="Most iterations of the NMF.")
    nmf_orthogonality: float = Field(
        0.0, ge=0, description="Weight of a penalty on tokens and positions shared by topics; 0 is the plain NMF."
    )
    seed: int = Field(0, ge=0, description="Seed of the samples and of the NMF.")
    shortlist: int = Field(30, ge=0, description="Tokens with positions and co-occurrence; 0 turns both off.")
    density_positions: int = Field(16, ge=1, description="Positions from the start (of the answer) told apart.")
    cooccurrence_positions: int = Field(8192, ge=1, description="Positions of whole sequences read for co-occurrence.")
    windows: int = Field(20, ge=0, description="Likelihood-ratio windows listed per direction; 0 turns them off.")
    window_tokens: int = Field(20, ge=1, description="Tokens per window.")
    window_step: int = Field(5, ge=1, description="Tokens from one window to the next.")
    shown: int = Field(40, ge=1, description="Tokens among the findings.")
