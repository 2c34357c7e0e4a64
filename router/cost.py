"""What a prefill or a step costs on a class of workers, learnt online by recursive least squares.

Forms of algorithms.md section 14: prefill_ms(u, L) = a + b u + c u (2L - u) / 2 for u uncached of L tokens, and
step_ms(batch) = a' + b' batch; forgetting factor 0.995.
"""

from __future__ import annotations

from collections.abc import Sequence

FORGETTING = 0.995
KILO = 1000.0
PRIOR_SPREAD = 100.0  # how little the first guess is trusted
GAIN_MAX = 1e6  # keeps the covariance bounded when samples say nothing new
SURPRISE_MAX = 4.0  # times what was predicted, or is usual: for more no sample counts
USUAL_SHARE = 0.05  # of a sample in what is usual
FLOOR_MS = 0.05


class LeastSquares:
    """Milliseconds = weights . x, refit with every sample; old samples fade."""

    def __init__(self, weights: Sequence[float], *, forgetting: float = FORGETTING) -> None:
        self.weights = list(weights)
        self._forgetting = forgetting
        size = len(self.weights)
        self._spread = [[PRIOR_SPREAD if row == column else 0.0 for column in range(size)] for row in range(size)]
        self._usual_ms = 0.0

    def predict(self, x: Sequence[float]) -> float:
        return sum(weight * each for weight, each in zip(self.weights, x, strict=True))

    def learn(self, x: Sequence[float], took_ms: float) -> None:
        """One sample (Plackett's update); one that is far above what was expected counts for less than it says.

        A worker that was stopped for seconds says nothing of its steps, and nothing makes one seem too short. What has
        really become slower is learnt none the less.
        """
        predicted_ms = self.predict(x)
        counted_ms = min(took_ms, SURPRISE_MAX * max(FLOOR_MS, predicted_ms, self._usual_ms))
        self._usual_ms += USUAL_SHARE * (counted_ms - self._usual_ms)
        spread_x = [sum(entry * each for entry, each in zip(row, x, strict=True)) for row in self._spread]
        scale = self._forgetting + sum(each * along for each, along in zip(x, spread_x, strict=True))
        error = counted_ms - predicted_ms
        gain = [along / scale for along in spread_x]
        self.weights = [weight + each * error for weight, each in zip(self.weights, gain, strict=True)]
        for row, each in zip(self._spread, gain, strict=True):
            for column, along in enumerate(spread_x):
                row[column] = min(GAIN_MAX, max(-GAIN_MAX, (row[column] - each * along) / self._forgetting))


class CostModel:
    """Milliseconds on one class of workers (same model, dtype and fingerprint). Never predicts less than the floor."""

    def __init__(self) -> None:
        # A first guess in the range of a small model on a CPU: 2 ms a token would be wrong by ten either way at most.
        self._prefill = LeastSquares([5.0, 1000.0, 50.0])
        self._step = LeastSquares([10.0, 2.0])

    def prefill_ms(self, num_uncached: int, num_tokens: int) -> float:
        """Predicted time to prefill the last `num_uncached` of `num_tokens` tokens, alone."""
        predicted = self._prefill.predict(_features(num_uncached, num_tokens))
        return max(FLOOR_MS, predicted)

    def step_ms(self, batch: int) -> float:
        """Predicted time of one decode step of `batch` requests; never less for more of them.

        Where a step takes as long for many as for few, noise has the fit fall, and the fullest worker would be taken.
        """
        fixed_ms, row_ms = self._step.weights
        return max(FLOOR_MS, fixed_ms + max(0.0, row_ms) * batch)

    def learn_prefill(self, num_uncached: int, num_tokens: int, took_ms: float) -> None:
        self._prefill.learn(_features(num_uncached, num_tokens), took_ms)

    def learn_step(self, batch: int, took_ms: float) -> None:
        self._step.learn((1.0, float(batch)), took_ms)


def _features(num_uncached: int, num_tokens: int) -> tuple[float, float, float]:
    """In thousands of tokens, so that the three are of like size."""
    u, length = num_uncached / KILO, num_tokens / KILO
    return 1.0, u, u * (2 * length - u) / 2
