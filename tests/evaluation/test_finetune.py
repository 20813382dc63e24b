import os

import pytest
import torch
import torch.multiprocessing as mp

from msn.commands.entry import compose
from msn.evaluation.augment import seeded
from msn.evaluation.features import Runtime
from msn.evaluation.finetune import FineTuning
from msn.evaluation.lowshot import evaluate
from tests.evaluation.test_protocols import finetune
from tests.evaluation.toys import ToyImages, toy_backbone

CPU = torch.device("cpu")


def test_seeded_draws_leave_the_generators_as_they_were():
    before = torch.get_rng_state()
    found = []
    for _ in range(2):
        with seeded(3, 1, device=CPU):
            found.append(torch.rand(4))
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_on_a_gpu_are_seeded_too_and_its_generator_is_left_as_it_was():
    device = torch.device("cuda", 0)
    before = torch.cuda.get_rng_state(device)
    found = []
    for _ in range(2):
        with seeded(3, 1, device=device):
            found.append(torch.rand(4, device=device))
    assert torch.equal(*found)
    assert torch.equal(torch.cuda.get_rng_state(device), before)


def test_what_stands_in_readme_s_table_of_deviations_is_so():
    """The last norm learns a layer below the head; class token; bicubic crops; nothing erased."""
    recipe = finetune(layer_decay=0.65, weight_decay=0.05).recipe
    subject = toy_backbone()
    tuning = FineTuning(
        subject, ToyImages(2), recipe, features=finetune().features, seed=0,
        runtime=Runtime((CPU,), 0, shared=False),
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in tuning.model.named_parameters()}
    rates = {names[id(p)]: g["lr_scale"] for g in tuning._groups() for p in g["params"]}
    assert rates["head.weight"] == 1.0
    assert rates["norm.weight"] == rates["blocks.1.mlp.fc2.weight"] == pytest.approx(0.65)
    assert tuning.model.global_pool == "token"
    assert "bicubic" in str(recipe.transform(subject))
    assert "bilinear" in str(subject.transform)
    assert compose("eval_lowshot", ["protocol=finetune"]).protocol.recipe.random_erasing == 0


def _share(rank: int, directory: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    test = ToyImages(3, seed=1, unreadable=[2])
    (result,) = evaluate(
        finetune(batch_size=4), [toy_backbone()], ToyImages(4, unreadable=[0]), test,
        num_workers=0, device=CPU, shared=True,
    )  # fmt: skip
    torch.save((result.row, len(test.opened)), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_processes_share_the_test_images_and_agree(tmp_path):
    mp.spawn(_share, (str(tmp_path),), nprocs=2)
    (one, opened), (other, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    assert (opened, others) == (5, 4)
    assert (one["replaced_images"], one["unreadable_test_images"]) == (1, 1)


def test_maes_recipe_reads_the_mean_of_patches_through_a_norm_of_its_own():
    recipe = finetune(pool="mean").recipe
    subject, images = toy_backbone(), torch.randn(2, 3, 16, 16)
    tuning = FineTuning(
        subject, ToyImages(2), recipe, features=finetune().features, seed=0,
        runtime=Runtime((CPU,), 0, shared=False),
    )  # fmt: skip
    model = tuning.model.eval()
    tokens = subject.trunk.forward_features(images, norm=False)
    expected = torch.nn.functional.layer_norm(tokens[:, 1:].mean(dim=1), (tokens.shape[-1],))
    found = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    names = {name for name, _ in model.named_parameters()}
    assert {"fc_norm.weight", "fc_norm.bias"} <= names
    assert "norm.weight" not in names
    composed = compose("eval_lowshot", ["protocol=finetune_mae"]).protocol.recipe
    assert (composed.random_erasing, composed.pool, composed.layer_decay) == (0.25, "mean", 0.65)


def test_lora_starts_as_the_frozen_trunk_and_trains_factors_and_head_alone():
    recipe = finetune(lora_rank=2, epochs=2).recipe
    subject, images = toy_backbone(), torch.randn(3, 3, 16, 16)
    tuning = FineTuning(
        subject, ToyImages(4), recipe, features=finetune().features, seed=0,
        runtime=Runtime((CPU,), 0, shared=False),
    )  # fmt: skip
    model = tuning.model.eval()
    found = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = subject.trunk.forward_features(images, norm=True)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuning.run()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    factors = {name for name in before if name.endswith((".weight.0.a", ".weight.0.b"))}
    assert len(factors) == 2 * 4 * 2  # a and b, layers of a block, blocks
    assert changed == factors | {"head.weight", "head.bias"}
    (result,) = evaluate(
        finetune(lora_rank=2), [subject], ToyImages(4), ToyImages(3, seed=1),
        num_workers=0, device=CPU,
    )  # fmt: skip
    assert result.row["variant"] == "LoRA 2"
