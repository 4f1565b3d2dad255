"""A run with the feature cache beside one without."""

from __future__ import annotations

import pytest

from tests.train.conftest import losses


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_are_those_without(trainer, tmp_path, stage):
    runs = {"plain": {}, "float32": {"feature_cache_dtype": "float32"}, "bfloat16": {}}
    for name, changes in runs.items():
        if name != "plain":
            changes["feature_cache"] = str(tmp_path / "cache")
        run = trainer(stage=stage, out=name, epochs=2, lr=1e-3, **changes)
        run.model.init_weights(1)
        run.run()
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "float32") == pytest.approx(plain, rel=1e-5)
    assert losses(tmp_path / "bfloat16") == pytest.approx(plain, rel=2e-3)
    assert losses(tmp_path / "bfloat16") != plain  # it was used
    assert len(list((tmp_path / "cache").glob("*.features"))) == 2
