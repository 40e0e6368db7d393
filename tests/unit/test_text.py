"""How prompts are handed to a pipeline's encode_prompt, on a stand-in with the signatures of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modiff.teachers.families import FAMILIES
from modiff.teachers.text import absent_parts, call_encode_prompt, name_encodings


class StandIn:
    """A pipeline whose call has a longer text than its encode_prompt, as FLUX's and Sana's have."""

    device = torch.device("cpu")

    def __call__(self, prompt: str | None = None, max_sequence_length: int = 300, clean: bool = True) -> None: ...

    def encode_prompt(
        self,
        prompt: list[str],
        prompt_2: str,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 77,
        negative_prompt: str | None = None,
    ) -> tuple[Any, ...]:
        assert prompt_2 is None
        assert negative_prompt is None
        text = torch.full((len(prompt), max_sequence_length, 2), 1.0)
        return text, torch.zeros_like(text) if do_classifier_free_guidance else None


@pytest.mark.parametrize("guided", [True, False])
def test_rows_of_the_empty_prompt_follow_under_guidance(guided) -> None:
    encodings = call_encode_prompt(StandIn(), ["a", "b"], guided)
    named = name_encodings(encodings, FAMILIES["sd"], guided)["encoder_hidden_states"]
    assert named.shape == (4 if guided else 2, 300, 2)
    assert named[:2].eq(1).all()
    assert named[2:].eq(0).all()


def test_unused_encodings_are_left_out() -> None:
    text, pooled, ids = torch.ones(1, 8, 4), torch.ones(1, 4), torch.ones(8, 3)
    named = name_encodings((text, pooled, ids), FAMILIES["flux"], guided=False)
    assert named.keys() == {"encoder_hidden_states", "pooled_projections"}


def test_denoiser_and_decoder_are_not_loaded_for_text(tmp_path) -> None:
    (tmp_path / "model_index.json").write_text('{"transformer": [], "vae": [], "text_encoder": [], "scheduler": []}')
    assert absent_parts(tmp_path) == ["transformer", "vae"]
