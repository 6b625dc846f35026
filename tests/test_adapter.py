"""Views of one base: what they share, what they train, and that nothing else has to know."""

import copy
import gc

import pytest
import torch
from small import SMALL
from torch import nn

from adapter import adapted, adapters, aim, anywhere, layers, merged, pairs, watched
from engine import ranks
from engine.calls import conditioning
from ida import ida_update
from nets.mmdit import MLP
from nets.weights import digest
from schedule import generator


def make(teacher="flux-dev", rank=2, views=1, words=(), **how):
    """A base, views of it, aimed alike."""
    torch.manual_seed(0)
    base = SMALL[teacher].build(1.0).requires_grad_(False)
    for name, x in base.named_parameters():
        if "final" in name or name.startswith("out."):
            nn.init.normal_(x, std=0.1)  # what a network begins with may be silent
    made = [adapted(base, layers(base, words), rank, **how) for _ in range(views)]
    aim(made, anywhere(made[0], seed=0))
    return base, made


def stir(view, seed=0):
    """As if it had been trained."""
    with torch.no_grad():
        for name, x in view.named_parameters():
            x.add_(0.05 * torch.randn(x.shape, generator=generator(seed, name)))
    return view


def call(net, teacher="flux-dev"):
    torch.manual_seed(1)
    x_t = torch.randn(2, *SMALL[teacher].latent_shape((96, 64)))
    return net(x_t, torch.tensor([0.3, 0.8]), conditioning(SMALL[teacher], 2, torch.float32))


def dense(base, view):
    return dict(merged(base.state_dict().items(), pairs(view)))


class Stack(nn.Sequential):
    def blocks(self):
        return list(self)


# --- a view --------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", SMALL)
def test_a_view_begins_as_its_base_and_has_only_adapters(teacher):
    base, (view,) = make(teacher)
    torch.testing.assert_close(call(view, teacher), call(base, teacher), atol=1e-6, rtol=1e-6)
    ups, downs = ({f"{name}.{part}" for name in layers(base)} for part in ("up", "down"))
    assert ups == {name for name, _ in view.named_parameters()}
    assert ups | downs == set(view.state_dict())


@pytest.mark.parametrize("teacher", SMALL)
def test_every_adapter_learns_and_the_base_does_not(teacher):
    base, (view,) = make(teacher)
    before = digest(base)
    call(stir(view), teacher).square().mean().backward()
    assert all(up.grad is not None and up.grad.any() for up in view.parameters())
    assert all(x.grad is None for x in base.parameters()) and digest(base) == before


@pytest.mark.parametrize("teacher", SMALL)
def test_merged_weights_compute_what_the_view_computes(teacher):
    """Linear layers, 1x1 and 3x3 convolutions with and without stride: W + B A is one layer."""
    base, (view,) = make(teacher)
    whole = copy.deepcopy(base)
    whole.load_state_dict(dense(base, stir(view)))
    torch.testing.assert_close(call(whole, teacher), call(view, teacher), atol=1e-5, rtol=1e-4)


def test_an_adapter_is_never_larger_than_its_layer():
    base, (view,) = make(rank=1000)
    for name, layer in layers(base).items():
        assert adapters(view)[name].up.shape == (len(layer.weight), min(layer.weight.shape))


def test_words_choose_the_layers():
    base, (view,) = make(words=("img_attn", "linear2"))
    chosen = {name.split(".", 2)[2] for name in adapters(view)}
    assert chosen == {"img_attn.qkv", "img_attn.proj", "linear2"}


def test_a_role_may_have_weights_of_its_own():
    own = {"final_layer.linear.bias": torch.ones(16)}
    base, (view, other) = make(views=1, own=own)[0], make(views=2, own=own)[1]
    assert view.final_layer.linear.bias is own["final_layer.linear.bias"]
    assert not torch.equal(base.final_layer.linear.bias, view.final_layer.linear.bias)
    assert not torch.equal(call(base), call(other))


# --- one base ------------------------------------------------------------------------------------


def storages(net):
    """Of all that a network computes with, hidden or not."""
    found = set()
    for module in net.modules():
        inside = [module, *getattr(module, "shared", ())]
        found |= {x.data_ptr() for m in inside for x in vars(m).values() if torch.is_tensor(x)}
        found |= {p.data_ptr() for m in inside for p in m.parameters(recurse=False)}
    return found


def test_three_roles_share_the_bases_storage():
    """Its every weight is at one address in teacher, student and fake score."""
    base, views = make(views=2)
    where = {x.data_ptr() for x in base.parameters()}
    for view in views:
        assert storages(view) - {x.data_ptr() for x in view.parameters()} == where


def alive():
    """Bytes of all tensors, each storage once."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    found += [x.grad for x in found if x.is_leaf and x.grad is not None]
    storages = [x.untyped_storage() for x in found]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def test_live_bytes_are_the_base_once_and_sixteen_for_each_trained_weight():
    """A itself, its gradient, Adam's two moments in fp32, for two roles; A once. Within 2 %."""
    before = alive()
    torch.manual_seed(0)
    base = Stack(*(nn.Linear(64, 64) for _ in range(4))).requires_grad_(False)
    views = [adapted(base, layers(base), 8) for _ in range(2)]
    for name, adapter in adapters(views[0]).items():
        adapters(views[1])[name].down = adapter.down
    for view in views:
        adam = torch.optim.AdamW(view.parameters(), foreach=False)
        x = torch.randn(1, 64)
        view(x).sum().backward()
        adam.step()
        view.adam, x = adam, None
    trained = sum(p.numel() for view in views for p in view.parameters())
    fixed = sum(x.nbytes for x in (*base.parameters(), *views[0].buffers()))
    assert alive() - before == pytest.approx(fixed + 16 * trained, rel=0.02)


# --- A -------------------------------------------------------------------------------------------


def test_directions_are_where_most_of_the_input_is():
    """Inputs of two directions and a little noise: A's rows span the two, at their length."""
    base, (view,) = make()
    name, layer = next(iter(layers(base).items()))
    plane = torch.linalg.qr(torch.randn(layer.in_features, 2)).Q
    with watched([view], rows=8) as found:
        for _ in range(2):
            x = torch.randn(50, 2) @ plane.T + 1e-4 * torch.randn(50, layer.in_features)
            adapters(view)[name](x)
    aim([view], found)
    down = adapters(view)[name].down
    torch.testing.assert_close(down @ down.T, layer.in_features / 2 * torch.eye(2))
    torch.testing.assert_close(down @ plane @ plane.T, down, atol=1e-2, rtol=0)


@pytest.mark.parametrize("teacher", SMALL)
def test_every_layer_is_watched_and_all_roles_read_the_same(teacher):
    base, views = make(teacher, views=2)
    before = digest(views[0])
    with watched(views, rows=6) as found:
        for view in views:
            call(view, teacher)
    aim(views, found)
    assert found.keys() == adapters(views[0]).keys()
    assert digest(views[0]) == digest(views[1]) != before
    for name, adapter in adapters(views[0]).items():
        rank, size = adapter.down.shape
        length = (size / rank) ** 0.5
        rows = adapter.down / length
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-5, rtol=0, msg=name)


# --- IDA -----------------------------------------------------------------------------------------


def gap(base, one, two):
    """Between the weights of two roles, as ordinary networks have them."""
    a, b = dense(base, one), dense(base, two)
    return torch.cat([(a[name] - b[name]).flatten() for name in a]).norm().item()


def test_ida_on_adapters_is_ida_on_weights():
    """n updates contract the gap of the dense weights by lambda^n, to 1e-6."""
    base, (fake, student) = make(views=2)
    stir(student, 1), stir(fake, 2)
    wanted = {n: 0.9 * a + 0.1 * dense(base, student)[n] for n, a in dense(base, fake).items()}
    start = gap(base, fake, student)
    ida_update(fake, student, 0.9)
    for name, x in dense(base, fake).items():
        torch.testing.assert_close(x, wanted[name], atol=1e-6, rtol=1e-6)
    for _ in range(19):
        ida_update(fake, student, 0.9)
    assert gap(base, fake, student) / start == pytest.approx(0.9**20, abs=1e-6)


def test_ida_on_both_factors_is_off_by_a_few_percent():
    """Of the pull on the dense weights, where A and B have both moved by a tenth of A's length: the
    product of averages is not the average of products."""
    base, (fake, student) = make(views=2, both=True)
    stir(student, 1), stir(fake, 2)
    a, b = dense(base, fake), dense(base, student)
    ida_update(fake, student, 0.9)
    off = torch.cat([(x - 0.9 * a[n] - 0.1 * b[n]).flatten() for n, x in dense(base, fake).items()])
    pull = torch.cat([(0.1 * (b[n] - a[n])).flatten() for n in a])
    assert 1e-3 < (off.norm() / pull.norm()).item() < 0.1


# --- computed again, compiled --------------------------------------------------------------------


def test_what_is_computed_again_has_its_own_role():
    """Student and fake score interleaved, with recomputation: gradients as without, bit for bit."""
    base, views = make(views=2)
    for seed, view in enumerate(views):
        call(stir(view, seed)).square().mean().backward()
    kept = [[p.grad.clone() for p in view.parameters()] for view in views]
    for view in views:
        view.zero_grad()
        ranks.recompute(view)
    student, fake = (call(view).square().mean() for view in views)
    call(base)
    student.backward()
    fake.backward()
    for grads, view in zip(kept, views, strict=True):
        assert all(torch.equal(a, p.grad) for a, p in zip(grads, view.parameters(), strict=True))


def test_compiled_roles_stay_apart():
    """Blocks of the base and of both roles, each whole in one graph: what they computed before,
    and gradients for the role that was called."""
    base = Stack(MLP(6, 12), MLP(6, 12)).requires_grad_(False)
    views = [adapted(base, layers(base), 2) for _ in range(2)]
    aim(views, anywhere(views[0], seed=0))
    nets, x = [base, *(stir(view, seed) for seed, view in enumerate(views))], torch.randn(3, 6)
    before = [net(x) for net in nets]
    for net in nets:
        for block in net.blocks():
            block.compile(backend="eager", fullgraph=True)
    for net, wanted in zip(nets, before, strict=True):
        torch.testing.assert_close(net(x), wanted)
    assert not torch.equal(before[1], before[2])
    views[0](x).sum().backward()
    assert all(p.grad.any() for p in views[0].parameters())
    assert all(p.grad is None for p in views[1].parameters())


def test_a_view_of_a_base_that_runs_otherwise_runs_by_itself():
    """Made after the base's blocks were told to be computed again: it has its own adapters."""
    base = SMALL["flux-dev"].build(1.0).requires_grad_(False)
    nn.init.normal_(base.final_layer.linear.weight)
    ranks.recompute(base)
    view = adapted(base, layers(base), 2)
    aim([view], anywhere(view, 0))
    assert not torch.allclose(call(stir(view)), call(base))
