"""What the modules of data/ share: the two ways to fail, and the numbers that llm.c's files carry."""

HEADER_INTS = 256  # every llm.c header: 256 little-endian int32
HEADER_BYTES = 4 * HEADER_INTS
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
MAX_VOCAB = 1 << 16  # token ids are uint16 in a shard
MAX_TOKEN_BYTES = 255  # a token's length is a u8 in the tokenizer binary
EOT_TEXT = "<|endoftext|>"


class InputError(Exception):
    """What the user gave cannot be used: one line, exit code 2."""


class RunError(Exception):
    """The input was fine and the run failed (disk, network, a killed worker): one line, exit code 1."""
