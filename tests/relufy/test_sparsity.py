import pytest
import torch

from turbosparse.relufy.recipes import Sparsity
from turbosparse.relufy.sparsity import ActivationTap, SparsityPressure, soft_count, soft_idle_count


def test_soft_count_approaches_the_hard_share_for_well_separated_neurons():
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(1, 4, 1)
    up = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(1, 4, 1)
    assert soft_count(sign, up).item() == pytest.approx(0.25, abs=0.02)
    assert soft_count(sign, up, gate_only=True).item() == pytest.approx(0.5, abs=0.02)


def test_soft_count_cannot_be_lowered_by_scale_but_by_shifting_down():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 9, 33), torch.randn(2, 9, 33)
    assert soft_count(gate * 1e-2, up * 1e-2).item() == pytest.approx(soft_count(gate, up).item(), rel=1e-3)
    shifted = (gate - 1).requires_grad_()
    count = soft_count(shifted, up)
    assert count < soft_count(gate, up)
    count.backward()
    assert (shifted.grad > 0).all()  # also neurons that are off are pushed further down


def test_soft_idle_count_is_the_share_of_gates_that_are_open_alone():
    gate = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]).repeat(1, 4, 1)
    up = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0]).repeat(1, 4, 1)
    assert soft_idle_count(gate, up).item() == pytest.approx(3 / 8, abs=0.02)


def test_soft_idle_count_closes_idle_gates_or_opens_their_ups():
    torch.manual_seed(3)
    gate, up = torch.randn(2, 9, 33).requires_grad_(), torch.randn(2, 9, 33).requires_grad_()
    assert soft_idle_count(gate * 1e-2, up * 1e-2).item() == pytest.approx(soft_idle_count(gate, up).item(), rel=1e-3)
    soft_idle_count(gate, up).backward()
    assert (gate.grad > 0).all()
    assert (up.grad < 0).all()
    idle, firing = (gate > 0.2) & (up < -0.2), (gate > 0.2) & (up > 0.2)
    assert gate.grad[idle].mean() > 5 * gate.grad[firing].mean()  # a neuron that fires keeps its gate


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_tap_counts_what_fires(activation):
    torch.manual_seed(1)
    gate, up = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    tap = ActivationTap(activation, None)
    h = gate.relu() * (up.relu() if activation == "drelu" else up)
    tap(gate, up, h)
    expected = [(x != 0).float().mean() for x in (gate.relu(), up.relu(), h)]
    torch.testing.assert_close(tap.rates, torch.stack(expected))
    assert tap.soft is None
    assert tap.soft_idle is None


def test_pressure_is_off_at_the_target_and_bounded_by_its_weight():
    pressure = SparsityPressure(Sparsity(target_rate=0.1, start_rate=0.5, ramp=0.5, weight=3.0, width=0.02))
    assert pressure.target(0.0) == 0.5
    assert pressure.target(0.25) == pytest.approx(0.3)
    assert pressure.target(0.9) == pytest.approx(0.1)
    soft = torch.tensor(0.2)
    assert pressure(torch.tensor(0.09), soft, 1.0) == 0.0
    assert pressure(torch.tensor(0.11), soft, 1.0).item() == pytest.approx(0.5 * 3.0 * 0.2, rel=1e-4)
    assert pressure(torch.tensor(0.9), soft, 1.0).item() == pytest.approx(3.0 * 0.2)


def test_a_tap_with_a_stride_looks_at_every_so_manieth_token():
    torch.manual_seed(2)
    gate, up = torch.randn(3, 10, 7), torch.randn(3, 10, 7)
    sampled, whole = ActivationTap("drelu", "count", stride=4), ActivationTap("drelu", "count")
    h = gate.relu() * up.relu()
    sampled(gate, up, h)
    whole(gate[:, [0, 4, 8]], up[:, [0, 4, 8]], h[:, [0, 4, 8]])
    assert torch.equal(sampled.rates, whole.rates)
    assert torch.equal(sampled.soft, whole.soft)
