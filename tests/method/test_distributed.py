"""Two gloo processes with half the batch each give what one process gives with the whole batch."""

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from benchmarks.traffic import step_traffic
from msn.method import distributed, loss, optim
from msn.method.distributed import whole
from msn.method.loss import MSNLoss
from msn.method.network import MSN
from msn.method.optim import FiniteCheck
from msn.method.schedules import ScheduleValues
from msn.training.strategy import DDP_OPTIONS, shard
from tests.conftest import SMALL_HEAD, SMALL_MODEL

STEPS = 5
# Of the trunk, as DINOv2 and DINOv3 have them.
FAMILIES = {
    "dinov2": {"registers": 2, "class_position": False, "layer_scale": 0.1, "mlp": "swiglu"},
    "dinov3": {
        "registers": 2,
        "position": "rope",
        "layer_scale": 0.1,
        "mlp": "swiglu",
        "rope_shift": 0.5,
        "rope_rescale": 2.0,
    },
}


class Step(torch.nn.Module):
    """Network and loss in one forward, as DDP wants it."""

    def __init__(self, chunk_size=None, options=None):
        super().__init__()
        self.chunk_size = chunk_size
        model = SMALL_MODEL | (options or {})
        self.network = MSN(model=model, head=SMALL_HEAD, num_prototypes=10).double()
        self.objective = MSNLoss(
            temperature=0.1,
            me_max_weight=1.0,
            entropy_weight=0.5,
            use_sinkhorn=True,
            sinkhorn_iterations=3,
        )

    def forward(self, part):
        network = self.network
        network.anchor.trunk.draw_positions(torch.Generator().manual_seed(1))
        views = part[0], part[1:2], part[2:, ..., :8, :8]
        out = network(*views, torch.arange(12), self.chunk_size)
        return self.objective(out.anchor, out.target, network.prototypes, 0.25)


def count(counted, name, function, tensor_of):
    def counting(*args, **kwargs):
        tensor = tensor_of(args)
        counted[name] = counted.get(name, 0) + tensor.numel() * tensor.element_size()
        return function(*args, **kwargs)

    return counting


def parallel(step, counted):
    """Under DDP, with the bytes of its collectives and of ours counted."""
    for name, position in {"all_reduce": 0, "all_gather": 1}.items():
        function = count(counted, name, getattr(dist, name), lambda args, i=position: args[i])
        setattr(dist, name, function)
    wrapped = torch.nn.parallel.DistributedDataParallel(step, **DDP_OPTIONS)
    wrapped._distributed_broadcast_coalesced = None  # running statistics are alike everywhere

    def average(state, bucket):
        gradients = bucket.buffer()
        counted["gradients"] = counted.get("gradients", 0) + gradients.numel() * 8
        work = dist.distributed_c10d._get_default_group().allreduce([gradients.div_(2)])
        return work.get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, average)
    return wrapped


def several_steps(images, rank=0, world=1, spoil=False, cut=False, chunk_size=None, options=None):
    """Loss, terms, targets, gradients and buffers of the first step, weights after five of them.

    And features of the target's trunk after three. With `options` of the trunk its layers have
    rates of their own.

    The gradient is DDP's, or FSDP2's where the network is cut. With `spoil` process 1 brings
    not-a-number in the third step.
    """
    torch.manual_seed(0)
    step, counted = Step(chunk_size, options), {}
    network = step.network
    if cut:
        shard(network, init_device_mesh("cpu", (world,)))
    run = parallel(step, counted) if world > 1 and not cut else step
    apart = {} if options is None else {"layer_decay": 0.5, "trunk_apart": True}
    optimizer = optim.build_optimizer(network, betas=(0.9, 0.999), eps=1e-8, fused=True, **apart)
    check = FiniteCheck(max_skipped=3)
    share = images.shape[1] // world
    part = images[:, rank * share : (rank + 1) * share]
    result, skipped = {}, []
    for number in range(STEPS):
        optimizer.zero_grad()
        counted.clear()
        terms = run(part * math.nan if spoil and (number, rank) == (2, world - 1) else part)
        terms.loss.backward()
        if number == 0:
            result["loss"] = distributed.all_reduce_sum(terms.loss) / world
            result["me_max"], result["targets"] = terms.me_max.detach(), terms.targets
            gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
            result |= {f"grad {n}": whole(grad).clone() for n, grad in gradients.items()}
            result |= {f"buffer {n}": value.clone() for n, value in network.named_buffers()}
        norm = optim.clip_encoder(network.anchor, 1.0)
        optim.set_values(optimizer, ScheduleValues(1e-3, 0.1, 0.9, 0.25, 5e-4))
        optimizer.found_inf = check.judge([terms.loss, norm])
        optimizer.step()
        network.update_target(0.9, check.skip)
        skipped.append(float(check.skip))
        if number == 2:  # training goes on afterwards
            trunk = network.target.trunk
            with torch.no_grad(), distributed.gathered(network, trunk):
                result["features"] = trunk.forward_features(images[0], norm=True)
    result |= {f"weight {n}": whole(p.detach()).clone() for n, p in network.named_parameters()}
    result["skipped"] = torch.tensor(skipped)
    return result, dict(counted)


def cold_gradients(rank=0, world=1):
    """Of anchors and prototypes where mean predictions underflow in float32; DDP's means."""
    generator = torch.Generator().manual_seed(5)
    anchor, target = (torch.randn(*shape, 3, generator=generator) for shape in ((2, 8), (8,)))
    prototypes = torch.randn(8, 3, generator=generator).requires_grad_()
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    objective = MSNLoss(
        temperature=1e-3,
        me_max_weight=1.0,
        entropy_weight=0.0,
        use_sinkhorn=True,
        sinkhorn_iterations=3,
    )
    terms = objective(anchor[:, share], target[share], prototypes, 0.25)
    terms.loss.backward()
    return {
        "cold me_max": terms.me_max.detach(),
        "cold log mean": terms.mean_prediction.log(),
        "cold gradient": distributed.all_reduce_sum(prototypes.grad) / world,
    }


def worker(rank, port, images, mutation, queue):
    """What a process of two finds; without a mutation also with a step that is spoilt."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if mutation == "logmeanexp":
        loss.all_reduce_logmeanexp = lambda x: x
    elif mutation == "logsumexp":
        loss.all_reduce_logsumexp = lambda x: x
    elif mutation == "batch norm":
        distributed.BatchNorm.forward = torch.nn.BatchNorm1d.forward
    result, counted = several_steps(images, rank, 2)
    if mutation is None:
        spoilt, _ = several_steps(images, rank, 2, spoil=True)
        result |= {f"spoilt {name}": spoilt[name] for name in spoilt if "weight" in name}
        result["spoilt skipped"] = spoilt["skipped"]
        result |= cold_gradients(rank, 2)
        in_parts, _ = several_steps(images, rank, 2, cut=True)
        result |= {f"cut {name}": value for name, value in in_parts.items()}
        for name, cut in {"chunked": False, "cut chunked": True}.items():
            in_chunks, _ = several_steps(images, rank, 2, cut=cut, chunk_size=3)
            result |= {f"{name} {key}": value for key, value in in_chunks.items()}
        for family, options in FAMILIES.items():
            for cut in (False, True):
                chunk_size = 3 if cut else None
                found, _ = several_steps(
                    images, rank, 2, cut=cut, chunk_size=chunk_size, options=options
                )
                result |= {f"{family} {cut} {key}": value for key, value in found.items()}
    queue.put((rank, {name: value.numpy() for name, value in result.items()}, counted))
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(images, mutation=None):
    port = free_port()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=worker, args=(rank, port, images, mutation, queue))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    got = sorted((queue.get() for _ in processes), key=lambda answer: answer[0])
    results, counted = [answer[1] for answer in got], got[0][2]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    merged = {k: torch.from_numpy(v) for k, v in results[0].items()}
    merged["targets"] = torch.cat([torch.from_numpy(result["targets"]) for result in results])
    return merged, counted


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(5, 8, 3, 16, 16, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def one(images):
    return several_steps(images)[0]


@pytest.fixture(scope="module")
def two(images):
    return two_processes(images)


def differing(ours, theirs):
    return {k for k in theirs if not torch.allclose(ours[k], theirs[k], rtol=1e-9, atol=1e-9)}


def test_two_processes_equal_one_on_the_joined_batch_for_five_steps(one, two):
    assert len([name for name in one if name.startswith("weight")]) > 80
    assert differing(two[0], one) == set()


def test_a_step_that_is_not_finite_in_one_process_is_taken_by_none(two, images):
    """Four steps are taken then: those of a run that has one less."""
    assert two[0]["spoilt skipped"].tolist() == [0, 0, 1, 0, 0]
    spoilt = {name: two[0][f"spoilt {name}"] for name in two[0] if name.startswith("weight")}
    alone, _ = several_steps(images, spoil=True)
    assert alone["skipped"].tolist() == [0, 0, 1, 0, 0]
    assert differing(alone, spoilt) == set()
    assert all(value.isfinite().all() for value in spoilt.values())


def test_two_processes_equal_one_where_mean_predictions_underflow(two):
    wanted = cold_gradients()
    assert (wanted["cold log mean"] == -math.inf).any()  # it does underflow
    assert wanted["cold gradient"].isfinite().all()
    for name in wanted:
        assert_close(two[0][name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["cut", "chunked", "cut chunked"])
def test_a_cut_network_and_chunks_change_nothing(one, two, how):
    """FSDP2: gradients, clipping, optimiser, EMA and running statistics on the parts.

    Chunks are of three images and one, under DDP and under FSDP2.
    """
    results = {key: two[0][f"{how} {key}"] for key in one if key != "targets"}  # of half the batch
    assert differing(results, {key: one[key] for key in results}) == set()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_registers_scales_rotations_and_layers_rates_change_nothing(two, images, family, cut):
    """Two processes under DDP, or cut by FSDP2 and in chunks, against one.

    BatchNorm takes the bias before it away again, so that its gradient is 0 but for rounding, which
    the optimiser divides by itself.
    """
    alone, _ = several_steps(images, options=FAMILIES[family])
    results = {key: two[0][f"{family} {cut} {key}"] for key in alone if key != "targets"}
    for found in (results, alone):
        assert found.pop("grad anchor.head.fc1.bias").abs().max() < 1e-11
        assert found.pop("weight anchor.head.fc1.bias").abs().max() < 1e-7
    assert differing(results, {key: alone[key] for key in results}) == set()


def test_bytes_that_are_sent_are_those_of_the_formulas(two):
    counted = two[1]
    formulas = {
        collective.name: collective.payload
        for collective in step_traffic(
            model=SMALL_MODEL,
            head=SMALL_HEAD,
            num_prototypes=10,
            use_sinkhorn=True,
            sinkhorn_iterations=3,
            view_groups=2,
            processes=2,
            element_size=8,
        )
    }
    assert counted.pop("gradients") == formulas["gradients"]
    gathers = ("head BatchNorm", "Sinkhorn", "me-max")
    assert counted.pop("all_gather") == sum(formulas[name] for name in gathers)
    sums = ("head BatchNorm gradient", "me-max gradient", "finite check")
    assert counted.pop("all_reduce") == sum(formulas[name] for name in sums)
    assert counted == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "seen"),
    [
        ("logmeanexp", "me_max"),
        ("logsumexp", "targets"),
        ("batch norm", "buffer anchor.head.bn1.running_var"),
    ],
)
def test_a_collective_replaced_by_the_identity_is_seen(images, one, mutation, seen):
    found = differing(two_processes(images, mutation)[0], one)
    assert seen in found
    assert any(name.startswith("weight") for name in found)


def test_on_one_process_collectives_are_the_identity():
    x = torch.randn(3)
    assert distributed.num_processes() == 1
    for kind in ("sum", "logsumexp", "logmeanexp"):
        assert_close(getattr(distributed, f"all_reduce_{kind}")(x), x)
