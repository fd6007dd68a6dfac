"""The maths of refusal heads: the loss, its gradient, low-rank approximation."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from steerbridge.low_rank import low_rank  # noqa: E402
from steerbridge.runtime import OutputHead  # noqa: E402
from steerbridge.training import head as heads  # noqa: E402
from steerbridge.training.settings import HeadSettings  # noqa: E402

pytestmark = pytest.mark.hf


def head_problem(seed=0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(12, 3, 16)).astype(np.float32) + np.eye(3, 16, dtype=np.float32) * 4
    weight = rng.normal(size=(64, 16)).astype(np.float32)
    return states, np.array([5, 9, 2]), OutputHead(weight, None, None)


def test_the_head_learns_the_exact_loss():
    states, target, head = head_problem()
    settings = HeadSettings(steps=200, batch=12, learning_rate=0.3)
    trained = heads.train_head(states, target, head, settings)
    h = states.reshape(-1, 16).astype(np.float64)
    labels = np.tile(target, 12)

    def loss(w):
        z = (h + trained.eps * h @ w.T) @ head.weight.T.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]))

    assert trained.loss_before == pytest.approx(loss(np.zeros((16, 16))), rel=1e-4)
    assert trained.loss_after == pytest.approx(loss(trained.matrix.astype(np.float64)), abs=1e-4)
    assert trained.loss_after < 0.05 * trained.loss_before


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [None, np.linspace(-1, 1, 32, dtype=np.float32)])
def test_the_loss_and_its_gradient_are_those_of_autograd(bias, softcap):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=rng)
    loss = heads.HeadLoss(OutputHead(weight.numpy(), bias, softcap))
    for rows in (5, 9, 3):  # one buffer, batches of several sizes
        h = torch.randn(rows, 16, generator=rng).requires_grad_()
        target = torch.randint(0, 32, (rows,), generator=rng)
        z = h @ weight.T + (0 if bias is None else torch.from_numpy(bias))
        z = softcap * torch.tanh(z / softcap) if softcap else z
        want = torch.nn.functional.cross_entropy(z, target)
        (wanted,) = torch.autograd.grad(want, h)
        got = loss(h, target)
        (gradient,) = torch.autograd.grad(2 * got, h)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(gradient, 2 * wanted, atol=1e-6)


def test_low_rank_is_the_best_and_says_what_it_lost():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(16, 3)) @ rng.normal(size=(3, 16))).astype(np.float32)
    cut = low_rank(matrix, 3)
    assert np.allclose(cut.u @ cut.v, matrix, atol=1e-4)
    assert cut.error < 1e-5
    one = low_rank(matrix, 1)
    measured = np.linalg.norm(one.u @ one.v - matrix) / np.linalg.norm(matrix)
    assert one.error == pytest.approx(measured, rel=1e-4)
    with pytest.raises(ValueError, match=r"1\.\.16"):
        low_rank(matrix, 17)
