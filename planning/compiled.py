"""What a compiled program needs of a device's memory, as its compiler plans it."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      arguments, outputs: what is passed and what is returned.
      donated: outputs that take the place of arguments.
      temporaries: what the program holds besides, while it runs.
      code: its instructions.
      peak: all at the same time, where the compiler says it, else 0.
      host: temporaries in the host's memory.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    code: int
    peak: int
    host: int

    @property
    def results(self) -> int:
        """Outputs that take no argument's place."""
        return self.outputs - self.donated

    @property
    def total(self) -> int:
        """Arguments, results and temporaries."""
        return self.arguments + self.results + self.temporaries


def memory(program: jax.stages.Compiled) -> Memory | None:
    """Returns what a program needs, None where the compiler does not tell."""
    m = program.memory_analysis()
    if m is None:
        return None
    return Memory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        donated=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        peak=getattr(m, "peak_memory_in_bytes", 0),
        host=m.host_temp_size_in_bytes,
    )
