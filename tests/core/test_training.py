"""The forgetting loop on a tiny ViT that has learned four separable classes in a second."""

import copy
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gsforget import control
from gsforget.control import StageControl, default_target, product_forces
from gsforget.errors import GsforgetError, RequestError
from gsforget.graphs import Graphs
from gsforget.kernels.group_prox import ProximalAdam
from gsforget.lora.blocks import find_feed_forward
from gsforget.lora.groups import LoRAGroups
from gsforget.material import Material
from gsforget.settings import Settings
from gsforget.steps import READ_EVERY, StepLog
from gsforget.tasks.classify import Classification, default_bound
from gsforget.training import Loop
from gsforget.validation import Validation

CLASSES, BEE = 4, 1


@dataclass
class Pixels:
    """Images by index: one coarse pattern per class, and noise."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def batch(self, indices):
        return self.pixels[indices]

    @classmethod
    def draw(cls, count: int, seed: int) -> "Pixels":
        patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(99))
        labels = torch.arange(count) % CLASSES
        noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return cls(torch.nn.functional.interpolate(patterns, size=16)[labels] + 0.5 * noise, labels)


def learned(depth: int):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        depth=depth,
        embed_dim=24,
        num_heads=2,
        num_classes=CLASSES,
    )
    images = Pixels.draw(240, 0)
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(14):
        for rows in torch.randperm(240).split(40):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(images.pixels[rows]), images.labels[rows]).backward()
            adam.step()
    model.eval()
    assert accuracy(model, Pixels.draw(80, 7)) == [100] * CLASSES
    return model


@pytest.fixture(scope="session")
def three_blocks():
    return learned(3)


@pytest.fixture(scope="session")
def one_block():
    return learned(1)


def as_they_are(images, train, val, forget, old=None) -> Material:
    """Material without made images."""
    old = torch.zeros_like(forget) if old is None else old
    return Material(images, train, val, forget, old, train, int((~(forget | old)[train]).sum()))


@torch.no_grad()
def accuracy(model, images) -> list[float]:
    right = model(images.pixels).argmax(1) == images.labels
    return [100 * right[images.labels == k].float().mean().item() for k in range(CLASSES)]


def loop(
    model, count=160, validation=True, forget=(BEE,), images=None, progress=None, method="gs-lora++", **options
) -> Loop:
    images = images or Pixels.draw(count, 1)
    rows, cut = torch.arange(count), count * 4 // 5 if validation else count
    task = Classification(CLASSES, forget, (), default_bound(CLASSES), method)
    chosen = Settings(**{"rank": 4, "batch_size": 32, **options})
    gone = torch.isin(images.labels, torch.tensor(forget))
    material = as_they_are(images, rows[:cut], rows[cut:], gone)
    return Loop(copy.deepcopy(model), task, material, chosen, progress)


@pytest.fixture(scope="session")
def done(three_blocks):
    """One finished run with the defaults; read-only."""
    events = []
    run = loop(three_blocks, progress=events.append)
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    run.run()
    return run, before, events


def test_forgets_one_class_and_keeps_the_rest(done):
    run, _, _ = done
    assert run.trained.watches[-1].forget <= 1
    after = accuracy(run.model, Pixels.draw(80, 7))
    assert after[BEE] <= 1
    assert min(after[:BEE] + after[BEE + 1 :]) >= 95


def test_inactive_groups_are_exactly_zero_and_their_blocks_run_bare(done):
    run, _, _ = done
    groups = run.groups
    active = groups.active_indices()
    assert len(active) == default_target(3) == run.trained.chosen["target_groups"] == 1
    for group, piece in enumerate(groups.flat.split(groups.lengths.tolist())):
        assert bool(piece.any()) == (group in active)
    taking_part = {n for n, m in run.model.named_modules() if m._forward_hooks or "forward" in m.__dict__}
    assert taking_part == {groups.entry(g) for g in active}


def test_it_goes_deeper_while_retained_accuracy_allows_and_a_probe_names_fewer(three_blocks, monkeypatch):
    run, leak = loop(three_blocks, count=640), Validation._leak
    measured = []

    def falling(self):
        measured.append(leak(self))
        return 90.0 - 10 * len(measured)

    monkeypatch.setattr(Validation, "_leak", falling)
    chosen = run.run().chosen
    assert chosen["depth"] in control.DEPTHS[1:]
    assert len(measured) == chosen["stages"] > 1
    assert all(0 <= found <= 100 for found in measured)


def test_where_retained_classes_have_no_images_it_goes_no_deeper(three_blocks):
    run = loop(three_blocks, count=640)
    run.material = replace(run.material, blind=True)
    chosen = run.run().chosen
    assert (chosen["stages"], chosen["depth"]) == (1, control.DEPTHS[0])


def test_with_a_handful_per_class_there_are_at_least_two_stages_and_none_deeper(three_blocks):
    run = loop(three_blocks, count=640)
    run.material = replace(run.material, handful=True)
    chosen = run.run().chosen
    assert run.trained.watches[0].sharp
    assert chosen["stages"] >= control.STAGES_UNSEEN
    assert chosen["depth"] == control.DEPTHS[0]


def test_an_epoch_is_as_long_as_what_is_there_however_much_is_made(three_blocks):
    run = loop(three_blocks, epochs=2, target_groups=3)
    run.material = replace(run.material, kept=40)
    assert run.run().chosen["steps"] == 2 * -(-40 // 32)


def test_few_validation_images_end_it_at_the_first_depth(done):
    run, _, _ = done
    assert (run.trained.chosen["stages"], run.trained.chosen["depth"]) == (2, control.DEPTHS[0])


def test_a_deeper_stage_that_costs_retained_accuracy_is_undone(three_blocks, monkeypatch):
    """Validation is made to say that all but the first lost too much: factors and depth are those after the first."""
    run, kept = loop(three_blocks, count=640), []
    watch = run._watch

    def lossy():
        found = watch()
        kept.append(run.groups.flat.detach().clone())
        return found if len(kept) == 1 else replace(found, retain=found.retain_before - 1.01 * control.NOISE)

    monkeypatch.setattr(run, "_watch", lossy)
    chosen = run.run().chosen
    assert (chosen["stages"], chosen["depth"]) == (2 + control.RETRIES, control.DEPTHS[0])
    assert torch.equal(run.groups.flat, kept[0])
    assert not torch.equal(kept[0], kept[1])
    assert run.trained.watches[-1] == run.trained.watches[0]


def test_in_bfloat16_it_forgets_as_well(three_blocks):
    """The network runs in bfloat16, and nothing else: losses and features arrive in float32, and outputs are reused."""
    run = loop(three_blocks, autocast=True)
    seen = run.sight.of_many(torch.arange(4))
    with torch.no_grad():
        exact = three_blocks(run.images.pixels[:4])
    assert {t.dtype for t in run.sight.of(torch.arange(4)).tensors} == {torch.float32}
    assert 1e-5 < (seen.outputs - exact).abs().max() < 0.1
    assert run.run().chosen["reused_outputs"]
    after = accuracy(run.model, Pixels.draw(80, 7))
    assert after[BEE] <= 1
    assert min(after[:BEE] + after[BEE + 1 :]) >= 95


def test_base_weights_are_bit_identical(done):
    run, before, _ = done
    after = run.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    replaced = {n for n, m in run.model.named_modules() if "forward" in m.__dict__}
    assert replaced == {run.groups.entry(g) for g in run.groups.active_indices()}  # nothing is left of reused outputs


def test_what_the_run_says_of_itself(done):
    run, _, events = done
    trained, chosen = run.trained, run.trained.chosen
    assert len(trained.norms) == chosen["steps"] > chosen["steps_select"] > control.WARMUP
    assert trained.norms[-1] == pytest.approx(run.groups.norms().tolist(), rel=1e-5)
    assert [e["step"] for e in events if e["stage"] in ("select", "settle")] == list(range(1, chosen["steps"] + 1))
    assert len(chosen["reused_outputs"]) in (1, 2, 3)
    assert chosen["stages"] == len(trained.watches)


def test_the_same_seed_gives_the_same_factors(done, three_blocks):
    run, _, _ = done
    again = loop(three_blocks).run()
    assert torch.equal(again.groups.flat, run.groups.flat)
    assert again.chosen == run.trained.chosen
    other = loop(three_blocks, seed=1).run()
    assert not torch.equal(other.groups.flat, run.groups.flat)


def read_every(run: Loop, steps: int) -> Loop:
    """As on a GPU."""
    run.log = StepLog(len(run.groups), run.device, steps)
    return run


def test_reading_every_few_steps_changes_no_step(done, three_blocks):
    """Selection ends at most that much later; the steps before are the same, and each is told, in order."""
    run, _, events = done
    told = []
    late = read_every(loop(three_blocks, progress=told.append), READ_EVERY)
    late.run()
    selected = run.trained.chosen["steps_select"]
    assert 0 <= late.trained.chosen["steps_select"] - selected < READ_EVERY
    assert late.groups.active_indices() == run.groups.active_indices()
    assert late.trained.norms[:selected] == run.trained.norms[:selected]
    first, second = ([e for e in found if e["stage"] != "validate"] for found in (events, told))
    assert second[:selected] == first[:selected]
    assert [e["step"] for e in second] == list(range(1, late.step + 1))
    assert len(late.trained.norms) == late.step
    assert accuracy(late.model, Pixels.draw(80, 7))[BEE] <= 1


def test_a_loss_that_is_no_number_is_said_with_its_step_however_late_it_is_read(three_blocks):
    told = []
    for steps in (1, READ_EVERY):
        run = read_every(loop(three_blocks, lr=1e25), steps)
        with pytest.raises(GsforgetError, match="diverged at step") as caught:
            run.run()
        told.append((caught.value.kind, caught.value.message.split("(")[0]))
    assert told[0] == told[1] == ("diverged", told[0][1])
    with pytest.raises(RequestError, match="removed every group"):
        read_every(loop(three_blocks, prox=1e3), READ_EVERY).run()


@pytest.mark.parametrize("method", ["gs-lora", "gs-lora++"])
def test_a_step_asks_the_host_for_nothing(three_blocks, method):
    """But at a reading.  The proximal step is the kernel; that the losses ask for nothing, see `test_there`."""
    run, asked = read_every(loop(three_blocks, method=method), READ_EVERY), []
    run.objective = run.task.objective(run.sight.of_many(torch.arange(160)), run.labels, run.forget, run.known)
    counter = torch.zeros(3, dtype=torch.int64)
    run.control = control.StrengthControl(1e-4, 1, counter)
    run.adam = ProximalAdam(run.groups.lengths, run.groups.weights, backend="interpret", programs=1)
    run.step = control.WARMUP

    waits = ("_local_scalar_dense", "is_nonzero", "equal", "_linalg_check_errors")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in waits:
                asked.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    run.log.add(run._losses(run._draw_batch()))  # so that the second step is the last but one before a reading
    with Watch():
        run._train_step(1e-3)
    assert asked == []
    assert run.log.unread == 2
    with Watch():
        read_every(run, 1)._train_step(1e-3)
    assert asked  # a step that is read
    run.groups.detach()


def test_captured_steps_train_the_same_bit_for_bit(done, three_blocks, capture_double):
    """With a double of CUDA graphs that replays Python; a graph for each set of groups, and one for reused outputs."""
    run, _, events = done
    told, double = [], capture_double()
    replayed = loop(three_blocks, progress=told.append)
    replayed.graphs = Graphs(double)
    replayed.run()
    assert replayed.graphs.off is None
    assert torch.equal(replayed.groups.flat, run.groups.flat)
    assert told == events
    assert replayed.trained.chosen == run.trained.chosen
    left = {tuple(n == 0 for n in norms) for norms in run.trained.norms}
    assert 2 < double.captured.count("network") <= len(left) + 1
    assert double.captured.count("work") == 2  # with and without the penalty
    assert len(double.replayed) == 2 * run.step + double.captured.count("network")


@pytest.mark.parametrize("switch", [{"reuse_prefix": False}, {"retire_groups": False}, {"cache_bytes": 0}])
def test_savings_do_not_change_the_result(done, three_blocks, switch):
    run, _, _ = done
    plain = loop(three_blocks, **switch).run()
    assert plain.groups.active_indices() == run.groups.active_indices()
    torch.testing.assert_close(plain.groups.flat, run.groups.flat, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("each", "validation"), [(4, True), (4, False), (2, False), (1, False)])
def test_a_few_images_are_enough_to_run(three_blocks, each, validation):
    run = loop(three_blocks, count=each * CLASSES, validation=validation)
    trained = run.run()
    after = accuracy(run.model, Pixels.draw(80, 7))
    assert after[BEE] <= 25
    assert sum(after) - after[BEE] >= 150
    assert bool(trained.watches) == validation


@pytest.mark.parametrize(("forget", "seed"), [((0, 3), 0), ((0,), 1)])
def test_groups_that_fall_together_do_not_all_die(three_blocks, forget, seed):
    """In both runs two groups shrink at the same pace; the penalty must let go of the last one in time."""
    run = loop(three_blocks, forget=forget, seed=seed)
    assert len(run.run().groups.active_indices()) == 1
    after = accuracy(run.model, Pixels.draw(800, 7))
    assert all(after[k] <= 1 if k in forget else after[k] >= 95 for k in range(CLASSES))


def test_one_block_and_as_many_groups_as_there_are(one_block, three_blocks):
    run = loop(one_block)
    assert run.run().groups.active_indices() == [0]
    assert accuracy(run.model, Pixels.draw(80, 7))[BEE] <= 1
    assert loop(three_blocks, target_groups=3).run().groups.active_indices() == [0, 1, 2]


@pytest.mark.parametrize("method", ["gs-lora", "gs-lora++"])
def test_a_class_forgotten_earlier_that_is_named_again_is_forgotten_again(three_blocks, method):
    cat = 2
    images, rows = Pixels.draw(160, 1), torch.arange(160)
    task = Classification(CLASSES, (BEE,), (cat,), default_bound(CLASSES), method)
    gone, old = images.labels == BEE, images.labels == cat
    settings = Settings(rank=4, batch_size=32)
    run = Loop(copy.deepcopy(three_blocks), task, as_they_are(images, rows[:128], rows[128:], gone, old), settings)
    chosen = run.run().chosen
    assert chosen["forgotten_again"] == [cat]
    watch = run.trained.watches[-1]
    assert (watch.old, watch.returned) == (0, [])
    after = accuracy(run.model, Pixels.draw(80, 7))
    assert after[BEE] <= 1
    assert after[cat] <= 1
    assert min(after[0], after[3]) >= 95


def after_cat(model, method="gs-lora++", **options) -> tuple[Loop, torch.Tensor]:
    """A request after `cat` was forgotten, as far as answers tell, from a model that names nothing so; and its images."""
    cat, quiet = 2, copy.deepcopy(model)
    with torch.no_grad():
        quiet.head.bias[cat] = -100
    images, rows = Pixels.draw(400, 1), torch.arange(400)
    task = Classification(CLASSES, (BEE,), (cat,), default_bound(CLASSES), method)
    gone, old = images.labels == BEE, images.labels == cat
    material = as_they_are(images, rows[:300], rows[300:], gone, old)
    return Loop(quiet, task, material, Settings(**{"rank": 4, "batch_size": 32, **options})), old


def test_images_of_earlier_classes_are_only_watched_where_nothing_came_back(three_blocks):
    """By answers alone, and where the user fixes the length: they change nothing but the report."""
    for options in ({"method": "gs-lora"}, {"epochs": 2}):
        run, old = after_cat(three_blocks, **options)
        chosen = run.run().chosen
        assert (chosen["forgotten_again"], chosen["batch_earlier"], chosen["depth_earlier"]) == ([], 0, None)
        used = torch.cat([*run.rounds.pools.values()])
        assert not old[used].any()


def test_what_is_left_of_earlier_classes_in_the_features_is_taken_along(three_blocks, monkeypatch):
    cat, started = 2, []
    along = StageControl.along
    monkeypatch.setattr(StageControl, "along", lambda self, watch: started.append((self, watch)) or along(self, watch))
    run, old = after_cat(three_blocks, target_groups=3, rank=8)
    chosen = run.run().chosen
    ((own, start),) = started
    assert (chosen["forgotten_again"], chosen["batch_earlier"]) == ([], run.batch_forget)
    assert chosen["stages"] == own.done + run.stages.done <= control.STAGES + control.ALONG
    assert chosen["depth"] == own.good_depth == run.objective.features.own_depth
    assert chosen["depth_earlier"] == run.stages.good_depth
    assert torch.equal(run.rounds.pools["earlier"], run.earlier.train)
    assert not old[torch.cat([run.rounds.pools[side] for side in ("retain", "forget")])].any()
    assert len(run.objective.features.earlier.among_all.rows) == 300  # that probe learns from all classes
    assert len(run.objective.features.separability.among_all.rows) == 225
    assert run.stages.good.leak <= start.leak
    after = accuracy(run.model, Pixels.draw(80, 7))
    assert (after[BEE], after[cat]) == (0, 0)
    assert min(after[0], after[3]) >= 95


def test_what_earlier_classes_would_cost_is_undone(three_blocks, monkeypatch):
    """Every stage that takes them along is made to look lossy: the factors are those from before."""
    run, _ = after_cat(three_blocks)
    seen, start = [], []
    along, watch = Loop._take_earlier_along, Loop._watch

    def taken(self):
        start.append(self.groups.flat.detach().clone())
        return along(self)

    def lossy(self):
        found = watch(self)
        seen.append(self.batch_earlier > 0)
        return replace(found, retain=found.retain_before - 50) if seen.count(True) > 1 else found

    monkeypatch.setattr(Loop, "_take_earlier_along", taken)
    monkeypatch.setattr(Loop, "_watch", lossy)
    run.run()
    assert seen.count(True) == 1 + 1 + control.RETRIES
    assert torch.equal(run.groups.flat, start[0])


def test_epochs_fix_the_length(three_blocks):
    chosen = loop(three_blocks, epochs=2, target_groups=3).run().chosen
    assert chosen["steps"] == 2 * -(-96 // 32)


@pytest.mark.parametrize("retire", [True, False])
def test_a_penalty_that_removes_everything_is_said(three_blocks, retire):
    with pytest.raises(RequestError, match="removed every group") as caught:
        loop(three_blocks, prox=1e3, retire_groups=retire).run()
    assert "--prox" in caught.value.hint


def test_nan_is_one_sentence(three_blocks):
    broken = copy.deepcopy(three_blocks)
    with torch.no_grad():
        broken.head.weight.fill_(torch.nan)
    with pytest.raises(GsforgetError, match="diverged at step 0"):
        loop(broken).run()
    images = Pixels.draw(160, 1)
    images.pixels[5] = torch.nan
    with pytest.raises(GsforgetError, match="diverged"):
        loop(three_blocks, images=images).run()
    with pytest.raises(GsforgetError, match="diverged") as caught:
        loop(three_blocks, lr=1e25).run()
    assert caught.value.kind == "diverged"
    assert "--lr 2e+24" in caught.value.hint


def test_draws_go_through_each_pool_once_per_pass(three_blocks):
    run = loop(three_blocks)
    assert (run.batch_retain, run.batch_forget) == (32, 16)
    seen = torch.cat([run.rounds.draw("retain", 32) for _ in range(3)])
    assert sorted(seen.tolist()) == run.rounds.pools["retain"].tolist()
    assert set(run.rounds.draw("forget", 32).tolist()) == set(run.rounds.pools["forget"].tolist())
    run.groups.detach()


def test_product_forces_are_weighted_spectral_norms(three_blocks):
    model = copy.deepcopy(three_blocks).requires_grad_(False)
    images = Pixels.draw(12, 3)
    groups = LoRAGroups(model, find_feed_forward(model, images.pixels[:2]), 4, 0)

    def loss():
        return torch.nn.functional.cross_entropy(model(images.pixels), (images.labels + 1) % CLASSES)

    forces = product_forces(groups, loss)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    loss().backward()
    for group, block in enumerate(model.blocks):
        norms = [torch.linalg.svdvals(w.grad.double())[0] for w in (block.mlp.fc1.weight, block.mlp.fc2.weight)]
        want = torch.stack(norms).norm() / groups.weights[group]
        assert forces[group].item() == pytest.approx(want.item(), rel=1e-4)
