# SPDX-License-Identifier: Apache-2.0
# Made from vmbus/cli/arguments.py by docs/make/bash_completion.py (`make docs`); not to be edited.
# Needs nothing of the bash-completion package.

_vmbusctl_machines() {
    # No dialogue and no start of vmbusd for the sake of the Tab key.
    timeout 3 vmbusctl --no-ask --no-autostart list --names 2>/dev/null
}

_vmbusctl() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD - 1]}"
    local verb="" options="" machines="" files="" index word
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        word="${COMP_WORDS[index]}"
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
            COMPREPLY=($(compgen -W "define abi run list show start stop shutdown kill reset pause resume save restore migrate snapshot template clone console port vsock attach-nic detach-nic attach-disk detach-disk set-link resize-disk change-media wait undefine memory set-memory prefault hugepages ksm host -h --help --json --bus-address --bus-name --no-ask --no-autostart" -- "$current"))
            return
            ;;
        define)
            options="-h --help --name --memory --vcpus --kernel --initrd --cmdline --firmware --boot --boot-menu --disk --nic --watchdog --port --vsock --cpu-model --machine-type --memory-kind --page-size --memory-minimum --memory-node --locked --prefault --no-balloon --on-reset --no-rng --dry-run --json --bus-address --bus-name --no-ask --no-autostart"
            files=yes
            ;;
        abi)
            options="-h --help --name --memory --vcpus --kernel --initrd --cmdline --firmware --boot --boot-menu --disk --nic --watchdog --port --vsock --cpu-model --machine-type --memory-kind --page-size --memory-minimum --memory-node --locked --prefault --no-balloon --on-reset --no-rng --uuid --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        run)
            options="-h --help --name --memory --vcpus --kernel --initrd --cmdline --firmware --boot --boot-menu --disk --nic --watchdog --port --vsock --cpu-model --machine-type --memory-kind --page-size --memory-minimum --memory-node --locked --prefault --no-balloon --on-reset --no-rng --detach --secret --json --bus-address --bus-name --no-ask --no-autostart"
            files=yes
            ;;
        list)
            options="-h --help --all --names --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        show)
            options="-h --help --stats --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        start)
            options="-h --help --paused --file --secret --console --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        stop)
            options="-h --help --deadline --no-wait --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        shutdown)
            options="-h --help --all --wait --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        kill)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        reset)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        pause)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        resume)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        save)
            options="-h --help --keep --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        restore)
            options="-h --help --paused --changed-disks --file --secret --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        migrate)
            options="-h --help --to --to-name --downtime --bandwidth --paused --undefine-source --file --copy-disk --separate-disk --secret --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        snapshot)
            options="-h --help --paused --file --secret --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        template)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        clone)
            options="-h --help --paused --file --secret --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        console)
            options="-h --help --read-only --steal --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        port)
            options="-h --help --read-only --steal --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        vsock)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        attach-nic)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        detach-nic)
            options="-h --help --deadline --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        attach-disk)
            options="-h --help --pass-files --secret --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        detach-disk)
            options="-h --help --deadline --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        set-link)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        resize-disk)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        change-media)
            options="-h --help --force --pass-files --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        wait)
            options="-h --help --state --timeout --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        undefine)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        memory)
            options="-h --help --watch --interval --count --plot --for --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        set-memory)
            options="-h --help --wait --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        prefault)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            machines=yes
            ;;
        hugepages)
            options="-h --help --page-size --node --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        ksm)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
        host)
            options="-h --help --json --bus-address --bus-name --no-ask --no-autostart"
            ;;
    esac
    case "$verb $previous" in
        "define --kernel")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "define --initrd")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "define --firmware")
            COMPREPLY=($(compgen -W "bios uefi" -- "$current"))
            return
            ;;
        "define --watchdog")
            COMPREPLY=($(compgen -W "off none reset poweroff pause" -- "$current"))
            return
            ;;
        "define --memory-kind")
            COMPREPLY=($(compgen -W "mergeable shareable huge" -- "$current"))
            return
            ;;
        "define --page-size")
            COMPREPLY=($(compgen -W "2M 1G" -- "$current"))
            return
            ;;
        "define --on-reset")
            COMPREPLY=($(compgen -W "restart end" -- "$current"))
            return
            ;;
        "define --name" | "define --memory" | "define --vcpus" | "define --cmdline" | "define --boot" | "define --disk" | "define --nic" | "define --port" | "define --vsock" | "define --cpu-model" | "define --machine-type" | "define --memory-minimum" | "define --memory-node" | "define --bus-address" | "define --bus-name")
            return
            ;;
        "abi --kernel")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "abi --initrd")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "abi --firmware")
            COMPREPLY=($(compgen -W "bios uefi" -- "$current"))
            return
            ;;
        "abi --watchdog")
            COMPREPLY=($(compgen -W "off none reset poweroff pause" -- "$current"))
            return
            ;;
        "abi --memory-kind")
            COMPREPLY=($(compgen -W "mergeable shareable huge" -- "$current"))
            return
            ;;
        "abi --page-size")
            COMPREPLY=($(compgen -W "2M 1G" -- "$current"))
            return
            ;;
        "abi --on-reset")
            COMPREPLY=($(compgen -W "restart end" -- "$current"))
            return
            ;;
        "abi --name" | "abi --memory" | "abi --vcpus" | "abi --cmdline" | "abi --boot" | "abi --disk" | "abi --nic" | "abi --port" | "abi --vsock" | "abi --cpu-model" | "abi --machine-type" | "abi --memory-minimum" | "abi --memory-node" | "abi --uuid" | "abi --bus-address" | "abi --bus-name")
            return
            ;;
        "run --kernel")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "run --initrd")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "run --firmware")
            COMPREPLY=($(compgen -W "bios uefi" -- "$current"))
            return
            ;;
        "run --watchdog")
            COMPREPLY=($(compgen -W "off none reset poweroff pause" -- "$current"))
            return
            ;;
        "run --memory-kind")
            COMPREPLY=($(compgen -W "mergeable shareable huge" -- "$current"))
            return
            ;;
        "run --page-size")
            COMPREPLY=($(compgen -W "2M 1G" -- "$current"))
            return
            ;;
        "run --on-reset")
            COMPREPLY=($(compgen -W "restart end" -- "$current"))
            return
            ;;
        "run --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "run --name" | "run --memory" | "run --vcpus" | "run --cmdline" | "run --boot" | "run --disk" | "run --nic" | "run --port" | "run --vsock" | "run --cpu-model" | "run --machine-type" | "run --memory-minimum" | "run --memory-node" | "run --bus-address" | "run --bus-name")
            return
            ;;
        "list --bus-address" | "list --bus-name")
            return
            ;;
        "show --bus-address" | "show --bus-name")
            return
            ;;
        "start --file")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "start --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "start --bus-address" | "start --bus-name")
            return
            ;;
        "stop --deadline" | "stop --bus-address" | "stop --bus-name")
            return
            ;;
        "shutdown --wait" | "shutdown --bus-address" | "shutdown --bus-name")
            return
            ;;
        "kill --bus-address" | "kill --bus-name")
            return
            ;;
        "reset --bus-address" | "reset --bus-name")
            return
            ;;
        "pause --bus-address" | "pause --bus-name")
            return
            ;;
        "resume --bus-address" | "resume --bus-name")
            return
            ;;
        "save --bus-address" | "save --bus-name")
            return
            ;;
        "restore --file")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "restore --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "restore --bus-address" | "restore --bus-name")
            return
            ;;
        "migrate --file")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "migrate --copy-disk")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "migrate --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "migrate --to" | "migrate --to-name" | "migrate --downtime" | "migrate --bandwidth" | "migrate --separate-disk" | "migrate --bus-address" | "migrate --bus-name")
            return
            ;;
        "snapshot --file")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "snapshot --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "snapshot --bus-address" | "snapshot --bus-name")
            return
            ;;
        "template --bus-address" | "template --bus-name")
            return
            ;;
        "clone --file")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "clone --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "clone --bus-address" | "clone --bus-name")
            return
            ;;
        "console --bus-address" | "console --bus-name")
            return
            ;;
        "port --bus-address" | "port --bus-name")
            return
            ;;
        "vsock --bus-address" | "vsock --bus-name")
            return
            ;;
        "attach-nic --bus-address" | "attach-nic --bus-name")
            return
            ;;
        "detach-nic --deadline" | "detach-nic --bus-address" | "detach-nic --bus-name")
            return
            ;;
        "attach-disk --secret")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "attach-disk --bus-address" | "attach-disk --bus-name")
            return
            ;;
        "detach-disk --deadline" | "detach-disk --bus-address" | "detach-disk --bus-name")
            return
            ;;
        "set-link --bus-address" | "set-link --bus-name")
            return
            ;;
        "resize-disk --bus-address" | "resize-disk --bus-name")
            return
            ;;
        "change-media --bus-address" | "change-media --bus-name")
            return
            ;;
        "wait --state")
            COMPREPLY=($(compgen -W "stopped starting running paused stopping crashed" -- "$current"))
            return
            ;;
        "wait --timeout" | "wait --bus-address" | "wait --bus-name")
            return
            ;;
        "undefine --bus-address" | "undefine --bus-name")
            return
            ;;
        "memory --plot")
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            return
            ;;
        "memory --interval" | "memory --count" | "memory --for" | "memory --bus-address" | "memory --bus-name")
            return
            ;;
        "set-memory --wait" | "set-memory --bus-address" | "set-memory --bus-name")
            return
            ;;
        "prefault --bus-address" | "prefault --bus-name")
            return
            ;;
        "hugepages --page-size")
            COMPREPLY=($(compgen -W "2M 1G" -- "$current"))
            return
            ;;
        "hugepages --node" | "hugepages --bus-address" | "hugepages --bus-name")
            return
            ;;
        "ksm --bus-address" | "ksm --bus-name")
            return
            ;;
        "host --bus-address" | "host --bus-name")
            return
            ;;
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    elif [[ $machines ]]; then
        COMPREPLY=($(compgen -W "$(_vmbusctl_machines)" -- "$current"))
    elif [[ $files ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}

complete -F _vmbusctl vmbusctl
