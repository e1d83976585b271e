"""The settings of a learning-rate schedule, and whether its phases fit into a run.

What the fields do is in `training.schedules`, which makes learning rates of them.
"""

import dataclasses

from tilescan.training.config_errors import ConfigError, at_least, one_of

SCHEDULES = (
    "constant", "linear", "cosine", "cosine_cycles", "cyclical", "wsd", "multi_step",
    "inverse_sqrt", "rewarmed", "infinite",
)  # fmt: skip
FILE = "file:"  # begins the name of a schedule that a file holds
UNITS = ("steps", "tokens")
DECAY_SHAPES = ("linear", "exponential", "cosine", "sqrt")
COOLDOWN_SHAPES = ("cosine", "inverse_sqrt")
# Fields that are counts of updates, or of tokens; so are the milestones.
_COUNTS = (
    "warmup_steps", "end_step", "decay_steps", "cycle_steps", "rewarm_start", "rewarm_steps",
    "cooldown_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    learning_rate: float = 3e-4  # the peak
    # constant, linear, cosine, cosine_cycles, cyclical, wsd, multi_step, inverse_sqrt, rewarmed,
    # infinite, or file:PATH with a factor of learning_rate for each update
    schedule: str = "cosine"
    # Of the phases of a schedule: "tokens", padding included, are rounded to whole updates.
    phases_in: str = "steps"
    # Updates until the peak; None: a tenth of train.steps, 100 where the schedule has no end.
    warmup_steps: int | None = None
    final_fraction: float = 0.1  # of the peak, where a schedule that falls ends
    end_step: int | None = None  # linear, cosine, rewarmed: they end there; None: train.steps
    decay_steps: int = 0  # wsd, infinite: length of the decay that ends the run, in updates
    # linear, exponential, cosine or sqrt; None: linear, of infinite exponential
    decay_shape: str | None = None
    cycle_steps: int = 0  # cosine_cycles, cyclical: length of the first cycle
    cycle_growth: float = 1.0  # cosine_cycles: each cycle is so many times as long as the last
    cycle_peak: float = 1.0  # cosine_cycles, cyclical: each peak is so many times the last
    milestones: tuple[int, ...] = ()  # multi_step: updates from which the rate is lower
    milestone_factor: float = 0.1  # multi_step: at each milestone the rate is so many times itself
    rewarm_start: int = 0  # rewarmed: the update at which it rises again
    rewarm_steps: int = 0  # rewarmed: until it is up again
    rewarm_fraction: float = 1.0  # rewarmed: of the peak, to which it rises
    cooldown_steps: int = 0  # infinite: from the peak to what stays
    cooldown_shape: str = "cosine"  # infinite: or inverse_sqrt
    cooldown_alpha: float = 10.0  # infinite: how soon inverse_sqrt falls; above 0
    constant_fraction: float = 0.5  # infinite: of the peak, that stays

    def __post_init__(self):
        if self.schedule.startswith(FILE):
            if self.warmup_steps:
                raise ConfigError("optimizer.warmup_steps: a schedule of a file has its own")
        else:
            one_of("optimizer.schedule", self.schedule, (*SCHEDULES, f"{FILE}PATH"))
        one_of("optimizer.phases_in", self.phases_in, UNITS)
        one_of("optimizer.decay_shape", self.decay, DECAY_SHAPES)
        one_of("optimizer.cooldown_shape", self.cooldown_shape, COOLDOWN_SHAPES)
        at_least("optimizer", self, 0, *_COUNTS, "learning_rate", "final_fraction", "cycle_peak")
        at_least("optimizer", self, 0, "milestone_factor", "rewarm_fraction", "constant_fraction")
        at_least("optimizer", self, 1, "cycle_growth")
        if self.cooldown_alpha <= 0:
            raise ConfigError(f"optimizer.cooldown_alpha = {self.cooldown_alpha} must be above 0")
        needed = _NEEDED.get(self.schedule)
        if needed and not getattr(self, needed):
            above = "" if needed == "milestones" else " > 0"
            raise ConfigError(
                f"optimizer.schedule = {self.schedule!r} needs optimizer.{needed}{above}"
            )
        rising = sorted({m for m in self.milestones if m > 0})
        if list(self.milestones) != rising:
            raise ConfigError(
                f"optimizer.milestones = {self.milestones} must rise, from above 0: {(*rising,)}"
            )
        ends = {"wsd": ("final_fraction",), "infinite": ("final_fraction", "constant_fraction")}
        for name in ends.get(self.schedule, ()) if self.decay_steps else ():
            if self.decay == "exponential" and not getattr(self, name):
                raise ConfigError(
                    f"optimizer.{name} = 0 is no end of an exponential decay: set it above 0, or "
                    "optimizer.decay_shape to 'linear', 'cosine' or 'sqrt'"
                )

    @property
    def decay(self) -> str:
        """The shape of the decay that ends a run."""
        return self.decay_shape or ("exponential" if self.schedule == "infinite" else "linear")

    @property
    def endless(self) -> bool:
        """Whether the schedule does not look at a run's end."""
        if self.schedule == "infinite":
            return not self.decay_steps
        return self.schedule in _ENDLESS


# What a schedule can't be without, and the schedules that don't look at a run's end.
_NEEDED = {
    "cosine_cycles": "cycle_steps",
    "cyclical": "cycle_steps",
    "wsd": "decay_steps",
    "multi_step": "milestones",
    "rewarmed": "rewarm_start",
    "infinite": "cooldown_steps",
}
_ENDLESS = ("constant", "cosine_cycles", "cyclical", "multi_step", "inverse_sqrt")


def warmup_steps(config: ScheduleConfig, steps: int) -> int:
    """Returns the updates until the peak in a run of `steps` updates.

    Where the schedule has no end, the default is not a share of the steps: a run that is continued
    for longer is the same run. Cycles that rise by themselves, and files, have no warm-up.

    Raises:
        ConfigError: see `check_phases`.
    """
    check_phases(config, steps)
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.schedule == "cyclical" or config.schedule.startswith(FILE):
        return 0
    return 100 if config.endless else min(steps // 10, _room(config, steps))


def _room(config: ScheduleConfig, steps: int) -> int:
    """Returns the longest warm-up that fits into a schedule with an end."""
    if config.schedule == "rewarmed":
        return config.rewarm_start - 1
    if config.schedule in ("linear", "cosine"):
        return max((config.end_step or steps) - 1, 0)
    return steps - sum(_phases(config).values())


def _phases(config: ScheduleConfig) -> dict[str, int]:
    """Returns what stands in a schedule, one after another, besides the warm-up."""
    names = {"wsd": ("decay_steps",), "infinite": ("cooldown_steps", "decay_steps")}
    names["rewarmed"] = ("rewarm_start", "rewarm_steps")
    return {name: getattr(config, name) for name in names.get(config.schedule, ())}


def check_phases(config: ScheduleConfig, steps: int) -> None:
    """Raises ConfigError, with what would fit, if the phases don't fit into a run's steps."""
    if config.phases_in != "steps":
        raise ConfigError("optimizer.phases_in = 'tokens': see schedules.in_steps")
    end = config.end_step or steps
    if config.schedule in ("linear", "cosine", "rewarmed"):
        _must_fit({"end_step": end}, steps)
    phases = _phases(config)
    if config.schedule == "rewarmed" and end < steps:
        _must_fit(phases, end, "optimizer.end_step")
    _must_fit(phases, steps)
    late = [m for m in config.milestones if m >= steps]
    if config.schedule == "multi_step" and late:
        raise ConfigError(
            f"optimizer.milestones = {config.milestones}: {late[0]} is not below train.steps = "
            f"{steps}, so that it would change nothing: {steps - 1} is the last that does"
        )

    # The warm-up that was set.
    w = config.warmup_steps
    if w is None or config.endless and config.schedule != "infinite":
        return
    if config.schedule in ("wsd", "infinite"):
        _must_fit({"warmup_steps": w, **phases}, steps)
    elif w > (room := _room(config, steps)):
        until = f"train.steps = {steps}" if end == steps else f"optimizer.end_step = {end}"
        if config.schedule == "rewarmed":
            until = f"optimizer.rewarm_start = {config.rewarm_start}"
        raise ConfigError(
            f"optimizer.warmup_steps = {w} leaves nothing of {until} for the {config.schedule!r} "
            f"schedule: warmup_steps = {room} is the longest that fits"
        )


def _must_fit(phases: dict[str, int], steps: int, limit: str = "train.steps") -> None:
    """Raises ConfigError, with the nearest lengths that do, if phases are longer than a run."""
    over = sum(phases.values()) - steps
    if over <= 0:
        return
    listed = " and ".join(f"optimizer.{name} = {value}" for name, value in phases.items())
    fit = [f"{name} = {value - over}" for name, value in phases.items() if value >= over]
    raise ConfigError(
        f"{listed} {'together exceed' if len(phases) > 1 else 'exceeds'} {limit} = {steps}: "
        f"{' or '.join([*fit, f'{limit} = {steps + over}'])} would fit"
    )


def in_steps(config: ScheduleConfig, tokens: int) -> ScheduleConfig:
    """Returns a schedule with its phases in updates of so many tokens, at least one each."""
    if config.phases_in == "steps":
        return config
    to_steps = lambda count: max(1, round(count / tokens)) if count else count
    phases = {name: to_steps(getattr(config, name)) for name in _COUNTS}
    milestones = tuple(to_steps(count) for count in config.milestones)
    return dataclasses.replace(config, phases_in="steps", milestones=milestones, **phases)
