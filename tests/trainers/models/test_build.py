"""Building of models: what a first start and a resume write beside the weights."""

from __future__ import annotations

from pathlib import Path

from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.models.build import build_model
from outlast.trainers.tasks.base import find_task
from tests.support.tasks.seq2seq_models import build, tiny


def test_a_resume_keeps_the_generation_settings_of_the_pretrained_model(tmp_path: Path) -> None:
    """Such as the end tokens of a chat model, or the language to begin with; `config.json` does not have them."""
    tokenizer = train_bpe(iter(["the cat sat on the mat"]), 270)
    model = build(tiny("bart", vocab_size=len(tokenizer)))
    model.generation_config.update(num_beams=3, forced_bos_token_id=7, eos_token_id=[5, 6])
    model.save_pretrained(tmp_path)
    task = find_task("seq2seq-lm")(DataSettings(train="none"), tokenizer, {})
    settings = ModelSettings(path=str(tmp_path), task="seq2seq-lm")
    first, resumed = (build_model(settings, task, tokenizer, 7, fresh=fresh)[1] for fresh in (True, False))
    assert b'"forced_bos_token_id": 7' in first["generation_config.json"]
    assert resumed == first
