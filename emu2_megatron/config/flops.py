"""FLOPs of the model: one formula for the plan and for the MFU that training prints.

Convention (PaLM, arXiv 2204.02311, appendix B): matrix products only, 2 * m * n * k each; backward is twice forward;
what recompute or padding of the vocabulary add is not counted. Causal attention counts the half of the score matrix
that is used, of the whole sequence also where samples are kept apart in it. An encoder that is frozen counts its
forward pass alone.
"""

from dataclasses import dataclass

from emu2_megatron.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class Flops:
    """Model FLOPs."""

    encoder: float
    decoder: float
    """Projections included."""

    @property
    def total(self) -> float:
        """Both."""
        return self.encoder + self.decoder


def patches(model: ModelConfig) -> int:
    """Tokens P of a picture inside the encoder, CLS included."""
    return 1 + (model.encoder.image_size // model.encoder.patch_size) ** 2


def encoder_forward(model: ModelConfig) -> int:
    """One picture through the encoder."""
    e, P = model.encoder, patches(model)
    E, F = e.hidden_size, e.ffn_hidden_size
    block = P * (8 * E * E + 4 * E * F + 4 * P * E)
    return e.num_layers * block + 2 * (P - 1) * 3 * e.patch_size**2 * E


def layer_forward(model: ModelConfig, length: int) -> int:
    """One sequence of `length` tokens through one decoder layer."""
    D, F = model.decoder.hidden_size, model.decoder.ffn_hidden_size
    return length * (8 * D * D + 6 * D * F + 2 * length * D)


def vocabulary_forward(model: ModelConfig, rows: int | None = None) -> int:
    """One token through the output layer of `rows` rows; None takes the vocabulary without padding."""
    return 2 * model.decoder.hidden_size * (rows or model.decoder.vocab_size)


def projection_forward(model: ModelConfig) -> int:
    """One visual embedding through project_up or project_down."""
    return 2 * model.decoder.hidden_size * model.encoder.hidden_size


def step_flops(config: Config, sequences: float, pictures: float, encoded: float, regressed: float) -> Flops:
    """Model FLOPs of forward and backward over all ranks.

    Args:
        config: the run.
        sequences: packed sequences; padding inside them counts, it is computed like any token.
        pictures: pictures in them.
        encoded: those of them that went through the encoder, not loaded as features.
        regressed: visual embeddings that were predicted.
    """
    model, length = config.model, config.data.sequence_length
    decoder = sequences * (
        model.decoder.num_layers * layer_forward(model, length) + length * vocabulary_forward(model)
    ) + projection_forward(model) * (pictures * model.image_queries + regressed)
    return Flops(encoder_passes(config) * encoded * encoder_forward(model), 3 * decoder)


def encoder_passes(config: Config) -> int:
    """Forward passes that the encoder's work on a picture is worth."""
    return 3 if config.training.train_encoder else 1


def formula(config: Config) -> str:
    """The formula in words, for people who want to know what the MFU counts."""
    passes = "3 (trained)" if encoder_passes(config) == 3 else "1 (frozen: forward only)"
    return (
        "3 x [sequences x S x (L (8 D^2 + 6 D F + 2 S D) + 2 D V) + 2 D E x (embeddings in + embeddings regressed)] + "
        f"{passes} x pictures encoded x [L' P (8 E^2 + 4 E F' + 4 P E) + 2 (P - 1) 3 patch^2 E]; "
        "matrix products only, backward twice forward, half of the causal scores, no recompute"
    )
