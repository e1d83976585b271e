"""`tilescan completion`: what a shell needs to complete commands, options and keys."""

import argparse

from tilescan.cli import arguments

ABOUT = "print the script by which your shell completes commands and --config keys"
DESCRIPTION = """\
Print the script by which a shell completes commands, options, papers and the keys of --config. It
is made for this version: write it again after an update.

  tilescan completion bash > ~/.local/share/bash-completion/completions/tilescan
  tilescan completion zsh > ~/.zfunc/_tilescan                    fpath+=~/.zfunc in ~/.zshrc
  tilescan completion fish > ~/.config/fish/completions/tilescan.fish
"""
SHELLS = ("bash", "fish", "powershell", "tcsh", "zsh")

# Bash takes "--workdir=runs" for three words; the script knows two. And a key waits for its value:
# no space after "--config.train.steps=".
_BASH = """
_tilescan() {
  local words=() at=$COMP_CWORD i
  for i in "${!COMP_WORDS[@]}"; do
    if [[ ${COMP_WORDS[i]} != "=" ]]; then
      words+=("${COMP_WORDS[i]}")
    elif ((i == COMP_CWORD)); then
      words+=("")
    elif ((i < COMP_CWORD)); then
      ((at--))
    fi
  done
  COMP_WORDS=("${words[@]}") COMP_CWORD=$at
  _shtab_tilescan "$@"
  if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
    compopt -o nospace +o filenames 2>/dev/null || :
  fi
}
complete -o filenames -F _tilescan tilescan
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's argument."""
    parser.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    """Prints the script; returns the exit status."""
    import shtab

    from tilescan.experiments.harness import registry
    from tilescan.training.config_help import leaves, meanings

    # What is known of the arguments beyond their parsers.
    choices = {"paper": registry.NAMES, "scale": registry.SCALES}
    about = meanings()
    commands = next(action for action in options.root._actions if action.dest == "name")
    for name, sub in commands.choices.items():
        if name in ("train", "plan"):
            for key in leaves():
                sub.add_argument(f"--config.{key}=", help=about.get(key, "").replace("`", "'"))
        for action in sub._actions:
            if action.choices is None:
                action.choices = choices.get(action.dest)
            if action.type in (arguments.path, arguments.given):
                action.complete = shtab.FILE
    print(shtab.complete(options.root, options.shell) + _BASH * (options.shell == "bash"))
    return 0
