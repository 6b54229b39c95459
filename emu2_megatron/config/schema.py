"""What a run is made of, as frozen dataclasses; the string under each field is its documentation.

`emu2 train --help` prints these strings, YAML recipes fill the fields (`config/loading.py`), and `config/validate.py`
says which combinations can run. Names are Megatron's where Megatron has one.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EncoderConfig:
    """The visual encoder: the image tower of EVA-02-CLIP-E-plus."""

    image_size: int = 448
    """Height and width of an input picture, pixels; a multiple of patch_size."""
    patch_size: int = 14
    """Height and width of a patch, pixels."""
    num_layers: int = 64
    """Transformer blocks."""
    hidden_size: int = 1792
    """Width E of the residual stream and of a visual embedding."""
    num_attention_heads: int = 16
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = 15360
    """Width of the MLP."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every LayerNorm."""


@dataclass(frozen=True)
class DecoderConfig:
    """The language model: LLaMA-33B with Emu2's added tokens."""

    num_layers: int = 60
    """Transformer layers, shared out over the pipeline stages."""
    hidden_size: int = 6656
    """Width D of the residual stream."""
    num_attention_heads: int = 52
    """Attention heads (no grouped queries); divisible by the tensor-parallel size."""
    ffn_hidden_size: int = 17920
    """Width of the SwiGLU MLP."""
    vocab_size: int = 32272
    """Rows of the embedding and of the output layer: SentencePiece pieces plus added tokens (32274 for Emu2-Chat)."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is meant for, tokens."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    init_method_std: float = 0.02
    """Standard deviation of freshly initialised weights, here and in the encoder and the projections."""
    make_vocab_size_divisible_by: int = 1
    """The vocabulary is padded, per tensor-parallel rank, to a multiple of this; 64 suits GPUs. Padding never gets
    probability and never leaves the engine."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model; a preset first, single fields over it."""

    preset: str = "emu2_37b"
    """emu2_37b, emu2_chat_37b, emu2_small (about 100 M parameters) or emu2_tiny."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The visual encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The language model."""
    image_queries: int = 64
    """Visual embeddings Q of a still picture (64; Emu2-Chat 256): a square whose side divides the patch grid's."""
    frame_queries: int = 64
    """Visual embeddings of a video frame."""


@dataclass(frozen=True)
class DiffusionConfig:
    """What the decoders of pictures and of clips have in common: a UNet on visual embeddings of the encoder's width, in
    the latents of a VAE."""

    preset: str = ""
    """Named sizes."""
    image_size: int = 1024
    """Height and width of the pictures it is trained on, pixels; a multiple of what VAE and UNet together reduce them
    by."""
    unet_channels: tuple[int, ...] = (320, 640, 1280)
    """Channels of the UNet's levels, from the finest on; each level but the last halves height and width."""
    unet_attention_heads: tuple[int, ...] = (5, 10, 20)
    """Attention heads of each level; divide its channels."""
    unet_layers_per_block: int = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the VAE's levels, from the finest on; each level but the last halves height and width."""
    vae_layers_per_block: int = 2
    """Residual blocks of each of the VAE's levels in its encoder; one more in its decoder."""
    latent_channels: int = 4
    """Channels of the latents."""
    vae_scaling_factor: float = 0.13025
    """What latents are multiplied by to have about unit variance."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm; divide all channels."""
    condition_drop: float = 0.1
    """Share of samples that are trained without their embeddings, for classifier-free guidance."""
    null_condition: str = "image"
    """What stands for missing embeddings: image (those of a picture whose normalised pixels are all 0, as the released
    pipeline takes for guidance) or zeros. Not published for training."""
    noise_offset: float = 0.1
    """Standard deviation of what is added to the noise of a whole channel, so that brightness is learnt too."""
    min_picture_size: int = 512
    """Pictures whose shorter side has fewer pixels are left out."""
    largest_scale: float = 1.25
    """A picture is scaled until its shorter side is image_size times a number drawn between 1 and this; then a square
    is cut out of it. Not published."""
    encoder: str = ""
    """Whose embeddings it learns to read: a checkpoint of stage 1, or a released or exported folder. Empty: an encoder
    with fresh weights, of training.seed."""
    ema_decay: float = 0.0
    """Keep a moving average of the UNet's weights, with this decay a step; 0 keeps none. It is what is painted with
    and exported."""
    paint_every: int = 0
    """Steps between two rows of pictures in TensorBoard: originals, and what is painted of their embeddings; 0 paints
    at the end of the run only."""


@dataclass(frozen=True)
class VisualDecoderConfig(DiffusionConfig):
    """The visual decoder: the UNet of SDXL on visual embeddings of the encoder's width, and the VAE of SDXL."""

    preset: str = "emu2_gen"
    """emu2_gen, or emu2_gen_tiny (on the embeddings of emu2_tiny)."""
    unet_transformer_layers: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks after every residual block of each level; 0 leaves attention out. The last level's is also
    the middle's, and not 0."""
    time_embed_dim: int = 256
    """Width of the sinusoids for each of the six micro-conditions."""
    sdxl: str = ""
    """Where it begins: a folder of SDXL-base, or of an exported decoder, in diffusers' layout, with `unet` and `vae`.
    Empty: fresh weights, of training.seed."""


@dataclass(frozen=True)
class VideoDecoderConfig(DiffusionConfig):
    """The video decoder: the UNet of Stable Diffusion 2.1 made 3D, on visual embeddings of frames, and its VAE.

    Of its training nothing is published: what is not as the visual decoder's is chosen here."""

    preset: str = "emu2_video"
    """emu2_video, or emu2_video_tiny (on the embeddings of emu2_tiny)."""
    image_size: int = 768
    """Height and width of the frames it is trained on, pixels; a multiple of what VAE and UNet together reduce them
    by."""
    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of the UNet's levels, from the finest on; each level but the last has attention, and halves height and
    width."""
    unet_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    """Attention heads of each level; divide its channels."""
    vae_scaling_factor: float = 0.18215
    """What latents are multiplied by to have about unit variance."""
    noise_offset: float = 0.1
    """Standard deviation of what is added to the noise of a whole channel in all frames of a clip."""
    min_picture_size: int = 512
    """Videos whose shorter side has fewer pixels are left out."""
    largest_scale: float = 1.25
    """Frames are scaled until their shorter side is image_size times a number drawn between 1 and this; then a square
    is cut out of them. Scale and place are the same for all frames of a clip."""
    frames: int = 8
    """Frames T of a clip, evenly spread over the video; videos with fewer are left out. The language model is trained
    on 8 of a video."""
    temporal_kernel_size: int = 3
    """Frames that a temporal convolution sees; odd."""
    prediction_type: str = "v_prediction"
    """What the UNet predicts: v_prediction, as the checkpoint named Stable Diffusion 2.1 (768 pixels) was trained to,
    or epsilon (the noise), as its base version (512 pixels) was. The paper does not say which it began from. Weights of
    both have the same names and shapes: with the wrong one a checkpoint loads, and has to learn anew."""
    sd21: str = ""
    """Where it begins: a folder of Stable Diffusion 2.1 in diffusers' layout, with `unet`, which is made 3D, and `vae`.
    Empty: fresh weights, of training.seed."""


@dataclass(frozen=True)
class DataConfig:
    """Where sequences come from, and what they look like."""

    shards: tuple[str, ...] = ()
    """WebDataset tar shards: paths or glob patterns. With weights or samples_per_step, each of them is a source."""
    weights: tuple[float, ...] = ()
    """Blends the sources: for each entry of shards its share of the samples, relative to the others'. Empty: all shards
    are one source."""
    samples_per_step: tuple[int, ...] = ()
    """Instead of weights: for each entry of shards, its samples in every global batch (the paper's stage 2: 12800
    image-text, 6400 video-text, 3200 interleaved, 800 text)."""
    tokenizer: str = ""
    """A SentencePiece `tokenizer.model`; LLaMA's for the published sizes."""
    sequence_length: int = 2048
    """Tokens S of a packed sequence, visual ones included."""
    image_first_probability: float = 0.5
    """Chance that a picture comes before its caption rather than after it."""
    phrase_first_probability: float = 0.7
    """Chance that a grounded phrase comes before its box rather than after it."""
    supervise_image_markers: bool = False
    """Train the text loss on `[IMG]` and `[/IMG]` too. Emu1 masks them; for Emu2 nothing is published."""
    video_frames: tuple[int, ...] = (8,)
    """Frames taken from a video, evenly spaced; of several numbers, one is drawn each time (Emu2-Chat: 8, 12, 16)."""
    document_pictures: int = 8
    """Most pictures taken from an interleaved document at a time."""
    document_tokens: int = 1024
    """Most tokens taken from an interleaved document at a time, visual ones included."""
    attend_across_samples: bool = False
    """Let a sample attend to those packed before it in the same sequence."""
    packing_buffer: int = 16
    """Samples that each sequence of the batch may choose from while it is packed: more fill it better and spread
    pictures more evenly over the ranks. 1 packs in the order of the data."""
    max_bad_share: float = 0.05
    """End the run once more than this share of the samples read could not be used."""


@dataclass(frozen=True)
class ParallelConfig:
    """How one replica of the model, and the batch, are shared out over the ranks."""

    tensor_parallel_size: int = 1
    """Ranks that share every decoder layer; divides the decoder's attention heads."""
    pipeline_parallel_size: int = 1
    """Stages the decoder's layers are cut into; it need not divide their number."""
    virtual_pipeline_parallel_size: int = 1
    """Parts of each stage, for the interleaved schedule: shorter bubbles, more messages; needs at least two stages."""
    pipeline_layout: tuple[int, ...] | None = None
    """Decoder layers of each stage, first to last (of each part of each stage, in the order data flows, if there are
    several); null balances them by cost, the output layer's included: evenly wherever that is best."""
    context_parallel_size: int = 1
    """Ranks that share every sequence of the decoder; each holds two chunks of it, so that causal attention is even."""
    overlap_gradients: bool = False
    """Sum gradients of the decoder over replicas while the backward pass goes on, and gather its updated weights while
    the next forward pass begins, instead of after and before."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks by sequence: less memory, as many bytes exchanged."""
    data_parallel_size: int | None = None
    """Replicas; null takes as many as the world has room for."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    decoder_lr: float = 1e-5
    """Peak learning rate of the language model."""
    projection_lr: float = 1e-5
    """Peak learning rate of project_up and project_down."""
    encoder_lr: float = 1e-5
    """Peak learning rate of the visual encoder, when it is trained."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors (norms, biases) have none. Not published for Emu2: Emu1's value."""
    clip_grad: float = 5.0
    """Largest norm of all gradients together, encoder and decoder; 0 does not clip."""
    lr_schedule: str = "cosine"
    """cosine or linear, from the peak after warm-up to min_lr_ratio of it at the end of the run; or constant."""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; give this or warmup_ratio."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps; give this or warmup_steps."""
    warmup_shape: str = "linear"
    """linear, or log: fast at first (the paper calls the visual decoder's so, and gives no formula)."""
    visual_decoder_lr: float = 1e-4
    """Peak learning rate of the visual decoder."""
    video_decoder_lr: float = 1e-4
    """Peak learning rate of the video decoder. Not published: the visual decoder's."""


@dataclass(frozen=True)
class TrainingConfig:
    """The batch, the objective and the length of the run."""

    objective: str = "language"
    """What is trained: language (Emu2 itself: the next token or visual embedding), visual_decoder (from a picture's
    embeddings back to the picture) or video_decoder (from those of a clip's frames back to the clip)."""
    steps: int = 20350
    """Optimizer steps."""
    global_batch_size: int = 2048
    """Packed sequences in one step, over all replicas."""
    micro_batch_size: int = 1
    """Packed sequences B that go through the decoder at once."""
    precision: str = "bf16"
    """bf16 or fp16 (both with fp32 master weights and gradient sums; fp16 with a dynamic loss scale), or fp32."""
    initial_loss_scale: float = 2.0**32
    """fp16: what the loss is multiplied by at first. An overflow halves it, down to 1, and skips the update. Megatron's
    default is too large on purpose: every halving costs a step, but gradients that vanish under too small a scale do so
    silently, and those of a mean over millions of targets are tiny."""
    loss_scale_window: int = 1000
    """fp16: updates in a row without an overflow after which the loss scale doubles."""
    recompute: str = "none"
    """What the decoder's backward pass computes again instead of remembering: none, attention (Megatron's selective
    recompute, of the part whose memory grows with S²), full (every layer: least memory, about a third more FLOPs), or
    block (whole layers too, but only recompute_layers of them: as few as memory asks for)."""
    recompute_layers: int = 0
    """With recompute block, the layers computed again: the first N of every part of the pipeline. Otherwise 0."""
    train_encoder: bool = False
    """Train the visual encoder (stage 1) or leave it frozen (stage 2)."""
    encoder_micro_batch_size: int = 16
    """Pictures that go through the encoder at once."""
    encoder_keep_activations: bool = False
    """Keep the encoder's activations from the forward pass for its backward pass instead of running it again: faster,
    if there is memory for all of a rank's pictures at once."""
    encoder_prefetch: bool = False
    """Encode the pictures of the next step while this step's decoder runs, on a stream of its own (on a CPU, a thread);
    for a frozen encoder."""
    text_loss_weight: float = 1.0
    """Weight of the cross-entropy. Not published: both losses count alike by default."""
    image_loss_weight: float = 1.0
    """Weight of the regression loss."""
    seed: int = 1234
    """Seed of the weights and of the order of samples."""


@dataclass(frozen=True)
class Fp8Config:
    """Products of the linear layers in FP8, by Transformer Engine or emulated. Embedding, output layer, projections,
    norms and attention stay bf16."""

    recipe: str = "none"
    """How scales are found: none (bf16), delayed (from earlier micro-batches), current (from the tensor itself), block
    (blocks of 128; CUDA 12.9) or mxfp8 (blocks of 32; Blackwell)."""
    emulate: bool = False
    """Round the operands in plain PyTorch and multiply in fp32: the recipe's numbers without Transformer Engine, slower
    than bf16, for tests of convergence only."""
    decoder: bool = True
    """Use it in the decoder's layers."""
    encoder: bool = False
    """Use it in the encoder's blocks; not with delayed."""
    first_layers_bf16: int = 0
    """Decoder layers at the start that stay bf16; not with delayed."""
    last_layers_bf16: int = 0
    """Decoder layers at the end that stay bf16; not with delayed."""
    amax_history: int = 1024
    """Micro-batches whose largest values delayed looks back on."""
    amax_compute: str = "max"
    """What delayed takes from its history: max or most_recent."""
    margin: int = 0
    """Powers of two by which delayed keeps below a format's largest value."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run leaves behind besides weights."""

    directory: str = "runs/emu2"
    """Gets config.yaml, log.jsonl and TensorBoard's event files."""
    every: int = 1
    """Steps between two lines in the logs."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving the whole state of a run, and beginning from a saved one."""

    directory: str = ""
    """Where checkpoints go; empty means `checkpoints` below logging.directory."""
    every: int = 0
    """Steps between two checkpoints; 0 saves only at the end."""
    keep_last: int = 0
    """Checkpoints to keep, the latest; 0 keeps all. The latest whose weights are finite is never deleted, nor is one
    that is being read."""
    keep_every: int = 0
    """Keep those of every so many steps besides; 0 keeps none for that."""
    asynchronous: bool = False
    """Write in the background, from a copy in the host's memory; where that is too small, the run waits."""
    resume: str = ""
    """What to go on from: a checkpoint's folder, or `auto`: the latest in the directory, or from the start if there is
    none. A run that torchrun or SLURM starts again resumes by itself. (`emu2 train --resume` sets this.)"""
    older_if_damaged: bool = False
    """Whether `auto` may fall back to an older checkpoint where files of the latest are damaged or missing."""
    initialize_from: str = ""
    """A checkpoint to take weights from, and nothing else: the next stage's beginning. Its pictures may have had
    another size."""


@dataclass(frozen=True)
class GuardsConfig:
    """What keeps a run from being spoilt or lost (docs/running.md). Steps are numbered as in the log, from 1."""

    max_skips: int = 3
    """End the run when so many updates in a row could not be applied, because the loss or a gradient was not finite or
    the loss was a spike; until then such a step is skipped and the run goes on. 1 ends it at the first."""
    spike_factor: float = 0.0
    """A loss (both, weighted) above so many times the median of the last spike_window ones is a spike, and its update
    is skipped; 0 skips none."""
    spike_window: int = 100
    """Steps whose losses a spike is compared with; until there are as many, nothing is a spike."""
    steps_to_skip: tuple[int, ...] = ()
    """Steps whose batches are read but not trained on; they count, and the data's order stays as it is."""
    time_limit_minutes: float | None = None
    """Save and end, with exit code 75, so many minutes after the process started; null never does. Leave time for a
    step and the save."""
    hang_minutes: float = 10.0
    """If no step ends for so long (thrice that for the first one, once for a save), write down what every thread is
    doing, say which rank is late, and end the run with an error."""
    straggler_z: float = 4.0
    """A rank is a straggler if its own work (loading and encoding) takes longer than the median rank's by so many
    deviations; a deviation is at least 5% of the median and 1% of a step."""
    straggler_records: int = 3
    """Records of the log in a row in which a rank was one before it is named."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The batch and the objective."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """FP8."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """The logs."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """The guards."""
    visual_decoder: VisualDecoderConfig = field(default_factory=VisualDecoderConfig)
    """The visual decoder."""
    video_decoder: VideoDecoderConfig = field(default_factory=VideoDecoderConfig)
    """The video decoder."""


def trained_decoder(config: Config) -> VisualDecoderConfig | VideoDecoderConfig:
    """The settings of the decoder that a run trains.

    Raises:
        ValueError: it trains the language model.
    """
    match config.training.objective:
        case "visual_decoder":
            return config.visual_decoder
        case "video_decoder":
            return config.video_decoder
        case other:
            raise ValueError(f"training.objective {other} trains no decoder of pictures")


def queries_of(config: Config) -> list[int]:
    """Visual embeddings of each picture of a sample that a decoder is trained on: a picture, or a clip's frames."""
    if config.training.objective == "video_decoder":
        return [config.model.frame_queries] * config.video_decoder.frames
    return [config.model.image_queries]
