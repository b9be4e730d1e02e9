# SPDX-License-Identifier: Apache-2.0
"""completions/vmbusctl.bash, from the command line's parser. Machine names are asked of vmbusctl itself."""

from __future__ import annotations

import argparse

from docs.make.completion_words import Words, verbs

OUTPUT = "completions/vmbusctl.bash"

_TEMPLATE = """\
# SPDX-License-Identifier: Apache-2.0
# Made from vmbus/cli/arguments.py by docs/make/bash_completion.py (`make docs`); not to be edited.
# Needs nothing of the bash-completion package.

_vmbusctl_machines() {{
    # No dialogue and no start of vmbusd for the sake of the Tab key.
    timeout 3 vmbusctl --no-ask --no-autostart list --names 2>/dev/null
}}

_vmbusctl() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}"
    local verb="" options="" machines="" files="" index word
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        word="${{COMP_WORDS[index]}}"
        case "$word" in
            --bus-address | --bus-name) ((index++)) ;;
            -*) ;;
            *)
                verb="$word"
                break
                ;;
        esac
    done
    case "$verb" in
        "")
            COMPREPLY=($(compgen -W "{verbs} {common}" -- "$current"))
            return
            ;;
{cases}
    esac
    case "$verb $previous" in
{values}
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    elif [[ $machines ]]; then
        COMPREPLY=($(compgen -W "$(_vmbusctl_machines)" -- "$current"))
    elif [[ $files ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}

complete -F _vmbusctl vmbusctl
"""


def text() -> str:
    """The whole script."""
    found = verbs()
    cases, values = [], []
    for verb in found:
        cases.append(f"        {verb.name})")
        cases.append(f'            options="{" ".join(verb.options)}"')
        if verb.positional == "machine":
            cases.append("            machines=yes")
        elif verb.positional == "file":
            cases.append("            files=yes")
        cases.append("            ;;")
        values.extend(_values(verb))
    common = " ".join(word for word in found[0].options if word in found[0].common)
    return _TEMPLATE.format(
        verbs=" ".join(verb.name for verb in found),
        common=common,
        cases="\n".join(cases),
        values="\n".join(values),
    )


def _values(verb: Words) -> list[str]:
    """What comes after options that take a value."""
    lines: list[str] = []
    plain: list[str] = []
    for action in verb.with_value:
        name = f'"{verb.name} {action.option_strings[0]}"'
        if action.choices is not None:
            lines.append(f"        {name})")
            lines.append(f'            COMPREPLY=($(compgen -W "{_choices(action)}" -- "$current"))')
            lines += ["            return", "            ;;"]
        elif verb.kind(action) == "file":
            lines.append(f"        {name})")
            lines.append("            compopt -o filenames 2>/dev/null")
            lines.append('            COMPREPLY=($(compgen -f -- "${current#*=}"))')
            lines += ["            return", "            ;;"]
        else:
            plain.append(name)
    if plain:
        lines.append(f"        {' | '.join(plain)})")
        lines += ["            return", "            ;;"]
    return lines


def _choices(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))
