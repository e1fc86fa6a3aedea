"""
Every tolerance of the suite, with the error measured when it was set (2026-11-24, x86-64, torch 2.13). None may exceed
four times the larger of the measured error and one rounding of the dtype at the size of the values compared.
"""

# name: (tolerance, measured)
TOLERANCES = {
    # absolute, float64
    "attention_float64": (7e-15, 1.8e-15),  # outputs of order 1
    "attention_large_logits": (4e-13, 1.0e-13),  # float64, logits up to 1e3
    "gradient_float64": (2e-12, 4.8e-13),  # sums of up to 301 * 16 such terms
    "logits_float64": (7e-15, 8.9e-16),  # logits of order 10 after several layers
    "logits_norm_float32": (
        4e-5,
        8.2e-6,
    ),  # float64 but for the norms, float32 as released
    "logits_rope_tables_float32": (1e-6, 0),  # float64 model, rotation tables rounded at different places
    "loss_float32": (1e-6, 0),
    "rope_float32": (1e-5, 2.5e-6),  # angles up to 40,000 rad in float32, against float64
    # relative root mean square
    "attention_float32": (6e-7, 1.6e-7),
    "attention_bfloat16": (8e-3, 1.9e-3),
    "fold_float32": (4e-6, 1.0e-6),
    "kernel_logits_float32": (3.9e-6, 9.9e-7),
    "kernel_gradient_float32": (1.4e-5, 3.7e-6),
    # absolute, float32: log-probabilities in nats, of order 1 to 5
    "behavior_logprobs_float32": (1.6e-5, 4.3e-6),
    "grpo_loss": (4e-7, 1.1e-7),
    "grpo_weights": (1e-6, 2.5e-7),
    "grpo_gradient_float32": (3e-6, 7.8e-7),  # relative
}


# Largest error seen in this run by name: `pytest -v` prints it, which is where the table's second figures come from.
MEASURED: dict[str, float] = {}


def within(error: float, name: str) -> bool:
    MEASURED[name] = max(error, MEASURED.get(name, 0.0))
    return error <= TOLERANCES[name][0]


def relative_rms(got, want) -> float:
    """Root mean square of the difference over that of `want`, in float64."""
    got, want = got.double(), want.double()
    return ((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item()


def assert_close(got, want, name: str, what: str) -> None:
    """Largest absolute error within the named tolerance; `what` names the tensor in the message."""
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert within(error, name), f"{what}: off by {error:.2e}, tolerance {name} is {TOLERANCES[name][0]:.0e}"
