"""Training by masked autoencoders: against a plain loop, and its own rules."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from msn.commands.entry import build, compose
from msn.data.sampler import BatchKey
from msn.data.views import Views, ViewSettings, draw_noise
from msn.errors import UserError
from msn.training.judge import MAEFacts, judge_mae
from msn.training.mae_module import MAEModule
from tests.method.test_mae import transformers_twin
from tests.training.test_module import trainer_of

MODEL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
}
METHOD = {
    "kind": "mae",
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
    "decoder": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "start_lr": 0.0,
    "lr": 1e-2,
    "final_lr": 0.0,
    "warmup_epochs": 1,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
}


def module_of(*, chunk_size=None, **method):
    torch.manual_seed(0)
    return MAEModule(
        model=MODEL, method={**METHOD, **method}, seed=3, chunk_size=chunk_size, compile=False
    ).double()


def batches_of(count, images=4):
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(0, images, 3, 32, 32)
    return [
        Views(
            torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64),
            empty,
            empty,
            BatchKey(number // 2, number % 2, np.arange(images) + images * number),
        )
        for number in range(count)
    ]


def train(tmp_path, batches, *, epochs=1, accumulated=1, **settings):
    module = module_of(**settings)
    steps = -(-len(batches) // accumulated)
    module.plan_schedule(epochs=epochs, steps_per_epoch=steps)
    trainer = trainer_of(tmp_path, max_epochs=epochs, accumulate_grad_batches=accumulated)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.network, trainer


def test_six_steps_are_those_of_a_plain_loop_around_transformers_model(tmp_path):
    """AdamW, decay on matrices and tokens alone, warm-up and cosine, each batch's own masks."""
    transformers = pytest.importorskip("transformers")
    batches = batches_of(2)
    twin, same = transformers_twin(module_of().network, 0.75, True)
    ours, _ = train(tmp_path, batches, epochs=3)  # three times two batches
    trained = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 6)
    for batch in [*batches] * 3:
        noise = draw_noise(seed=3, epoch=batch.origin.epoch, indices=batch.origin.indices, count=16)
        optimizer.zero_grad()
        twin(batch.target, noise=torch.from_numpy(noise)).loss.backward()
        optimizer.step()
        schedule.step()
    for name, value in ours.state_dict().items():
        expected = torch.cat([part.detach() for part in same[name]])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7, msg=name)


def test_accumulated_batches_and_chunks_give_the_weights_of_whole_ones(tmp_path):
    halves = batches_of(4)
    wholes = [
        Views(
            torch.cat([one.target, two.target]),
            one.rand,
            one.focal,
            one.origin._replace(indices=np.concatenate([one.origin.indices, two.origin.indices])),
        )
        for one, two in zip(halves[::2], halves[1::2], strict=True)
    ]
    expected, first = train(tmp_path, wholes, epochs=2)
    accumulated, second = train(tmp_path, halves, epochs=2, accumulated=2)
    chunked, _ = train(tmp_path, wholes, epochs=2, chunk_size=3)
    assert first.global_step == second.global_step == 4
    for found in (accumulated, chunked):
        torch.testing.assert_close(
            dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-11
        )


def test_an_image_has_its_own_mask_in_each_epoch_whatever_lies_beside_it():
    def drawn(epoch, indices, seed=0):
        return draw_noise(seed=seed, epoch=epoch, indices=np.array(indices), count=16)

    together = drawn(5, [7, 8, 9])
    assert np.array_equal(together[1:2], drawn(5, [8]))
    assert np.array_equal(together[[2, 0]], drawn(5, [9, 7]))
    for other in (drawn(6, [7, 8, 9]), drawn(5, [7, 8, 9], seed=1)):
        assert not (together.argsort(1) == other.argsort(1)).all(1).any()
    shares = np.bincount(drawn(0, np.arange(4000)).argsort(1)[:, :4].ravel(), minlength=16) / 4000
    assert np.abs(shares - 0.25).max() < 0.03  # five standard deviations: no patch is preferred


def test_checkpoints_say_that_they_are_masked_autoencoders(tmp_path):
    _, trainer = train(tmp_path, batches_of(1), warmup_epochs=0)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    said = content["msn"]
    assert (said["format"], said["kind"], said["epoch"], said["seed"]) == (1, "mae", 1, 3)
    assert (said["model"], said["method"]["decoder"]) == (MODEL, METHOD["decoder"])
    assert {"network.trunk.cls_token", "network.decoder.mask_token"} <= set(content["state_dict"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.mask_ratio=1"], r"mask_ratio must be in \(0, 1\), got 1"),
        (["method.mask_ratio=0.99"], "keeps none of 16 patches"),
        (["model.patch_size=5"], "not divisible by model.patch_size 5"),
        (["method.decoder.num_heads=3"], "decoder.embed_dim must be a multiple of 4 and of num_h"),
        (["method.decoder.embed_dim=18", "method.decoder.num_heads=2"], "must be a multiple of 4"),
        (["method.decoder=null"], "method.decoder must be a group of keys"),
        (["method.norm_pix_loss=1"], "method.norm_pix_loss must be true or false"),
        (["method.lr=0"], "method.lr=0: must be > 0"),
        (["method.warmup_epochs=300"], "does not fit a training"),
    ],
)
def test_what_masked_autoencoders_cannot_take_ends_in_one_line(arguments, message):
    def plan():
        module = build(compose("train", ["experiment=mae_digits", *arguments]), "module")
        module.plan_schedule(epochs=150, steps_per_epoch=10)

    with pytest.raises(UserError, match=message):
        plan()


def test_keys_of_the_other_method_are_refused():
    with pytest.raises(UserError, match=r"unknown key method.num_prototypes: allowed are .*mask_"):
        compose("train", ["experiment=mae_digits", "+method.num_prototypes=3"])
    with pytest.raises(UserError, match=r"method.mask_ratio"):
        compose("train", ["method.mask_ratio=0.5"])
    with pytest.raises(UserError, match=r"num_prototypes: allowed are.*experiment=mae_digits"):
        build(compose("train", ["method=mae"]), "module")  # with experiment=digits, which is MSN's


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rand_views": 1}, "has 1 anchor views and method=mae takes none"),
        ({"rand_size": 64}, "data.views.rand_size=64: must be model.img_size=32"),
        ({"patch_size": 4}, "data.views.patch_size=4: must be model.patch_size=8"),
    ],
)
def test_views_that_do_not_fit_are_refused(changed, message):
    config = compose("train", ["experiment=mae_digits"])
    module = build(config, "module")
    with pytest.raises(UserError, match=message):
        module.check_settings(
            ViewSettings(**{**config.data.views, **changed}), batch_size=8, accumulated=4
        )


def judged(loss, *, epoch=20, **row):
    row = {
        "train/loss": loss,
        "train/grad_norm": 1.0,
        "reconstruction/error_of_means": 0.99,
        "features/rankme": 5.0,
        **row,
    }
    facts = MAEFacts(width=32, warmup_epochs=10, lr=1e-3)
    return judge_mae([row], facts, epoch=epoch, step=100)


@pytest.mark.parametrize(
    ("loss", "settings", "kind"),
    [
        (0.6, {}, "learning"),
        (0.985, {}, "means only"),
        (1.3, {}, "diverged"),
        (float("nan"), {"epoch": 1}, "diverged"),
        (1.3, {"epoch": 1}, "warming up"),
        (0.6, {"train/grad_norm": float("inf")}, "diverged"),
    ],
)
def test_verdicts(loss, settings, kind):
    assert judged(loss, **settings).kind == kind
