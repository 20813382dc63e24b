"""MAE against transformers' ViTMAEForPreTraining in float64, and its own rules."""

import math

import pytest
import torch

from msn.errors import UserError
from msn.method.mae import MAE, patchify, unpatchify

BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}


def mae(size=32, mask_ratio=0.75, norm_pix_loss=True, width=32, **decoder):
    model = {"img_size": size, "patch_size": 8, "embed_dim": width, "depth": 2}
    return MAE(
        model={**model, "num_heads": 2, "mlp_ratio": 4.0},
        decoder={"embed_dim": 16, "depth": 2, "num_heads": 2, **decoder},
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
    )


def transformers_twin(network, mask_ratio, norm_pix_loss):
    """transformers' model with the same weights, and its parameters by our names."""
    transformers = pytest.importorskip("transformers")
    trunk, width = network.trunk, network.decoder.embed.out_features
    twin = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=trunk.embed_dim,
            num_hidden_layers=trunk.depth,
            num_attention_heads=trunk.num_heads,
            intermediate_size=4 * trunk.embed_dim,
            image_size=trunk.img_size,
            patch_size=trunk.patch_size,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=len(network.decoder.blocks),
            decoder_num_attention_heads=network.decoder.blocks[0].attn.num_heads,
            decoder_intermediate_size=4 * width,
            mask_ratio=mask_ratio,
            norm_pix_loss=norm_pix_loss,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",  # eager softmax is in float32 whatever the weights are
        )
    ).double()
    theirs = dict(twin.named_parameters())
    names = {}
    for name in network.state_dict():
        part, _, rest = name.partition(".")
        prefix = {"trunk": "vit", "decoder": "decoder"}[part]
        if rest.startswith("blocks."):
            _, number, rest = rest.split(".", 2)
            layer = (
                f"vit.layers.{number}" if part == "trunk" else f"decoder.decoder_layers.{number}"
            )
            module, _, kind = rest.rpartition(".")
            if module == "attn.qkv":
                names[name] = [f"{layer}.attention.{x}_proj.{kind}" for x in "qkv"]
            else:
                names[name] = [f"{layer}.{BLOCK.get(module, module)}.{kind}"]
        elif part == "decoder":
            names[name] = [f"decoder.{rest}" if rest == "mask_token" else f"decoder.decoder_{rest}"]
        else:
            table = {
                "cls_token": "vit.embeddings.cls_token",
                "pos_embed": "vit.embeddings.position_embeddings",
                "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
                "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
            }
            names[name] = [table.get(rest, f"{prefix}.layernorm.{rest.rpartition('.')[2]}")]
    with torch.no_grad():
        for name, value in network.state_dict().items():
            for piece, their_name in zip(value.chunk(len(names[name])), names[name], strict=True):
                theirs[their_name].copy_(piece)
    return twin, {name: [theirs[n] for n in found] for name, found in names.items()}


@pytest.mark.parametrize(
    ("size", "mask_ratio", "norm_pix_loss"),
    [(32, 0.75, True), (48, 0.6, False), (48, 0.75, True), (32, 0.6, False)],
)
def test_loss_prediction_and_every_gradient_are_those_of_transformers(
    size, mask_ratio, norm_pix_loss
):
    torch.manual_seed(0)
    network = mae(size, mask_ratio, norm_pix_loss).double()
    for parameter in network.parameters():  # so that biases and norms count
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    twin, same = transformers_twin(network, mask_ratio, norm_pix_loss)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    noise = torch.rand(3, (size // 8) ** 2, dtype=torch.float64)
    ours, theirs = network(images, noise), twin(images, noise=noise)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-10)
    torch.testing.assert_close(ours.prediction, theirs.logits, rtol=0, atol=1e-9)
    assert torch.equal(ours.mask, theirs.mask.to(ours.mask))
    ours.loss.backward()
    theirs.loss.backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert set(same) - set(trained) == {"trunk.pos_embed", "decoder.pos_embed"}
    for name, parameter in trained.items():
        expected = torch.cat([part.grad for part in same[name]])
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-8 * max(scale, 1e-3))


def test_six_steps_of_training_are_those_of_transformers():
    torch.manual_seed(1)
    network = mae().double()
    twin, same = transformers_twin(network, 0.75, True)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.05}
    ours = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], **settings)
    theirs = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **settings)
    for step in range(6):
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        noise = torch.rand(4, 16, dtype=torch.float64)
        for optimizer, loss in (
            (ours, network(images, noise).loss),
            (theirs, twin(images, noise=noise).loss),
        ):
            optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 6
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in network.state_dict().items():
        expected = torch.cat([part.detach() for part in same[name]])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)


def test_positions_are_the_released_ones():
    """Sines of the column, its cosines, then the row's: one entry computed by hand."""
    positions = mae().trunk.pos_embed[0]
    row, column = 2, 3
    here = positions[1 + row * 4 + column]
    assert torch.equal(positions[0], torch.zeros(32))
    frequency = 10000 ** (-1 / 8)  # the second of eight
    expected = [f(x * frequency) for x in (column, row) for f in (math.sin, math.cos)]
    torch.testing.assert_close(here[[1, 9, 17, 25]], torch.tensor(expected))


def test_only_masked_patches_count_and_only_kept_ones_are_seen():
    torch.manual_seed(2)
    network = mae(norm_pix_loss=False)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    out = network(images, noise)
    assert out.mask.sum(dim=1).tolist() == [12, 12]
    hidden = patchify(images, 8) + 100 * out.mask.unsqueeze(-1)
    unseen = network(unpatchify(hidden, 8), noise)
    torch.testing.assert_close(unseen.prediction, out.prediction)
    kept = patchify(images, 8) + 100 * (1 - out.mask).unsqueeze(-1)
    torch.testing.assert_close(
        network.loss(unpatchify(kept, 8), out.prediction, out.mask), out.loss
    )


def test_patches_come_back_as_images():
    images = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    patches = patchify(images, 8)
    assert torch.equal(patches[0, 1, :3], images[0, :, 0, 8])  # first pixel of the second patch
    assert torch.equal(unpatchify(patches, 8), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0}, r"mask_ratio must be in \(0, 1\), got 0"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\)"),
        ({"mask_ratio": 0.99}, "keeps none of 16 patches"),
        ({"size": 30}, "not divisible"),
        ({"num_heads": 3}, "multiple of 4 and of num_heads=3, got 16"),
        ({"embed_dim": 18}, "multiple of 4"),
        ({"depth": 0}, "decoder.depth must be a whole number >= 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        mae(**settings)


def test_a_width_that_fixed_positions_do_not_fit_is_refused():
    with pytest.raises(UserError, match="model.embed_dim must be a multiple of 4 .* got 34"):
        mae(width=34)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="images must be 32 x 32 px"):
        mae()(torch.zeros(1, 3, 16, 16), torch.rand(1, 4))
