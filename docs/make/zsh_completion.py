# SPDX-License-Identifier: Apache-2.0
"""completions/_vmbusctl, from the command line's parser. Machine names are asked of vmbusctl itself."""

from __future__ import annotations

import argparse

from docs.make.completion_words import Words, verbs

OUTPUT = "completions/_vmbusctl"

_TEMPLATE = """\
#compdef vmbusctl
# SPDX-License-Identifier: Apache-2.0
# Made from vmbus/cli/arguments.py by docs/make/zsh_completion.py (`make docs`); not to be edited.

_vmbusctl_machines() {{
    # No dialogue and no start of vmbusd for the sake of the Tab key.
    local -a machines
    machines=(${{(f)"$(timeout 3 vmbusctl --no-ask --no-autostart list --names 2>/dev/null)"}})
    compadd -a machines
}}

_vmbusctl() {{
    local curcontext="$curcontext" state line
    local -a verbs
    verbs=(
{verbs}
    )
    _arguments -C \\
{common}
        '1: :->verb' '*:: :->rest'
    case $state in
        verb) _describe -t commands command verbs ;;
        rest)
            case $words[1] in
{cases}
            esac
            ;;
    esac
}}

_vmbusctl "$@"
"""


def text() -> str:
    """The whole script."""
    found = verbs()
    cases: list[str] = []
    for verb in found:
        cases.append(f"                {verb.name})")
        cases.append("                    _arguments \\")
        cases += [
            f"                        {_spec(verb, action)} \\"
            for action in verb.actions
            if action.option_strings
        ]
        cases.append(f"                        {_positional(verb)}")
        cases.append("                    ;;")
    common = [action for action in found[0].actions if set(action.option_strings) & found[0].common]
    return _TEMPLATE.format(
        verbs="\n".join(f"        {_quoted(f'{verb.name}:{verb.summary}')}" for verb in found),
        common="\n".join(f"        {_spec(found[0], action)} \\" for action in common),
        cases="\n".join(cases),
    )


def _spec(verb: Words, action: argparse.Action) -> str:
    name = action.option_strings[-1]
    text = (action.help or "").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    value = ""
    if action.nargs != 0:
        what = str(action.metavar or "value").replace(":", " ").replace("[", "").replace("]", "")
        if action.choices is not None:
            value = f":{what}:({' '.join(map(str, action.choices))})"
        else:
            value = f":{what}:{'_files' if verb.kind(action) == 'file' else ' '}"
    repeat = "*" if isinstance(action, argparse._AppendAction) else ""
    return _quoted(f"{repeat}{name}[{text}]{value}")


def _positional(verb: Words) -> str:
    return {"machine": "'*:machine:_vmbusctl_machines'", "file": "'1:file:_files'"}.get(
        verb.positional, "'*: : '"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
