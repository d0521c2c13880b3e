"""Reinforcement learning: a small transformer keeps a pole upright, and learns to do so with one four times as long.

The policy is cloned from a scripted controller on CartPole-v1, then LoRA clones the controller of the long pole.
The policy for the short pole loses the long one within twenty steps.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
import torch
from scipy.linalg import solve_continuous_are
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .data import made_once
from .task import Batch, Task, compare, seeded_order

WINDOW = 8  # observations the policy sees
SCALE = np.array([2.4, 3.0, 0.2, 3.0], dtype=np.float32)  # position, velocity, angle, angular velocity
SHORT_POLE, LONG_POLE = 0.5, 2.0  # half lengths in metres


class Policy(nn.Module):
    """Push left or right, from the last observations."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=1, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=WINDOW, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.embed = nn.Linear(4, hidden)
        self.transformer = LlamaModel(config)
        self.head = nn.Linear(hidden, 2)

    def forward(self, observations: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:  # (b, window, 4)
        hidden = self.transformer(inputs_embeds=self.embed(observations), use_cache=False).last_hidden_state
        logits = self.head(hidden[:, -1])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def cart_poles(count: int, half_length: float) -> list[gymnasium.Env[Any, Any]]:
    environments = [gymnasium.make("CartPole-v1") for _ in range(count)]
    for environment in environments:
        cart: Any = environment.unwrapped
        cart.length, cart.polemass_length = half_length, cart.masspole * half_length
    return environments


def controller(half_length: float) -> np.ndarray:  # (4,)
    """Push right where gains · observation > 0: the linear-quadratic regulator of the linearised motion."""
    gravity, cart, pole = 9.8, 1.0, 0.1
    mass = cart + pole
    inertia = half_length * (4 / 3 - pole / mass)
    angle, push = gravity / inertia, -1 / (mass * inertia)  # of the angular acceleration
    coupling = -pole * half_length / mass
    a = np.array([[0, 1, 0, 0], [0, 0, coupling * angle, 0], [0, 0, 0, 1], [0, 0, angle, 0]], dtype=float)
    b = np.array([[0], [1 / mass + coupling * push], [0], [push]])
    solution = solve_continuous_are(a, b, np.diag([1, 0.1, 10, 0.1]), np.array([[0.01]]))
    return -(b.T @ solution)[0]


def windows(history: list[np.ndarray]) -> np.ndarray:  # (window, 4)
    """The last observations, the first one repeated where there are fewer."""
    return np.stack([history[0]] * (WINDOW - len(history)) + history[-WINDOW:]) / SCALE


def demonstrations(half_length: float, episodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows (steps, WINDOW, 4) and the controller's pushes (steps,); a fifth of the pushes made are random ones."""
    generator, gains = np.random.default_rng(seed), controller(half_length)
    inputs, pushes = [], []
    for environment in cart_poles(episodes, half_length):
        observation, _ = environment.reset(seed=int(generator.integers(2**31)))
        history, over = [observation], False
        while not over:
            inputs.append(windows(history))
            pushes.append(int(gains @ history[-1] > 0))
            push = int(generator.integers(2)) if generator.random() < 0.2 else pushes[-1]
            observation, _, fallen, out_of_time, _ = environment.step(push)
            history.append(observation)
            over = fallen or out_of_time
    return torch.from_numpy(np.stack(inputs)), torch.tensor(pushes)


def returns(policy: Callable[[Tensor], Tensor], half_length: float, seeds: Sequence[int]) -> list[float]:
    """Steps that the episodes of these seeds last (at most 500), all played side by side."""
    environments = cart_poles(len(seeds), half_length)
    histories = [[cart.reset(seed=seed)[0]] for cart, seed in zip(environments, seeds, strict=True)]
    lasted, running = [0.0] * len(seeds), list(range(len(seeds)))
    while running:
        pushes = policy(torch.from_numpy(np.stack([windows(histories[i]) for i in running]))).argmax(-1).tolist()
        for i, push in zip(tuple(running), pushes, strict=True):
            observation, reward, fallen, out_of_time, _ = environments[i].step(push)
            histories[i].append(observation)
            lasted[i] += float(reward)
            if fallen or out_of_time:
                running.remove(i)
    return lasted


class ReinforcementLearning(Task):
    """Behaviour cloning: 32 windows a step from 10 episodes; the score is the return of episodes played."""

    name = "reinforcement_learning"
    metric = "mean return over 20 episodes (of at most 500)"
    higher_is_better = True
    targets = r"transformer\..*_proj"
    rank = 4
    learning_rates = (1e-3, 3e-3, 1e-2)
    steps, evaluate_every = 40, 4

    @cached_property
    def pretrained(self) -> Policy:
        torch.manual_seed(0)
        if self.short:
            return Policy(16, 1)
        policy = Policy(64, 2)
        path = made_once("cartpole-policy-1.pt", lambda path: torch.save(cloned(policy).state_dict(), path))
        policy.load_state_dict(torch.load(path, weights_only=True))
        return policy

    def base(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.pretrained)

    def training(self, seed: int) -> list[Batch]:
        inputs, pushes = demonstrations(LONG_POLE, episodes=10, seed=100 + seed)
        order = torch.tensor(seeded_order(len(inputs), seed)).repeat(3)[: self.steps * 32].split(32)
        return [{"observations": inputs[chosen], "labels": pushes[chosen]} for chosen in order]

    @cached_property
    def validation(self) -> list[Batch]:
        inputs, pushes = demonstrations(LONG_POLE, episodes=2, seed=99)
        return [{"observations": inputs, "labels": pushes}]

    def mean_return(self, model: nn.Module, seeds: Sequence[int]) -> float:
        with torch.no_grad():
            return float(np.mean(returns(lambda x: model(observations=x).logits, LONG_POLE, seeds)))

    def validation_score(self, model: nn.Module) -> float:
        return self.mean_return(model, range(1000, 1002 if self.short else 1010))

    def score(self, model: nn.Module) -> float:
        return self.mean_return(model, range(2 if self.short else 20))


def cloned(policy: Policy, steps: int = 400) -> Policy:
    """Trained on the short pole's controller."""
    inputs, pushes = demonstrations(SHORT_POLE, episodes=40, seed=0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (128,), generator=generator)
        policy(inputs[chosen], pushes[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


if __name__ == "__main__":
    compare(ReinforcementLearning())
