"""What "Stuffed Mamba" publishes, by way of notes on it: sizes of models, and two laws of them."""

# Parameters, layers and width of the paper's models, all with 128 state dims and heads of 64.
SIZES = (
    ("36M", 6, 512),
    ("47M", 12, 512),
    ("85M", 12, 768),
    ("130M", 24, 768),
    ("370M", 48, 1024),
    ("780M", 48, 1536),
)

# Of the first law: thousands of tokens that a million more state elements need (figure 9).
SLOPE = 5.172


def state_elements(layers: int, d_model: int, state_dim: int = 128, conv_width: int = 4) -> int:
    """Returns N_S = L (2 E N + (W - 1) (2 E + 2 N)), with E the model's width and one group."""
    inner = 2 * d_model
    return layers * (inner * state_dim + (conv_width - 1) * (inner + 2 * state_dim))


def t_forget(n_s: float) -> float:
    """Returns the training length in tokens from which forgetting is learned (figure 9)."""
    return 1e3 * (SLOPE * n_s / 1e6 - 4.469)


def t_recall(n_s: float) -> float:
    """Returns the length in tokens of the longest prompt whose passkey is recalled (figure 11)."""
    return 1e3 * (4.756 * (1.365 ** (n_s / 1e6) - 1) - 0.742)
