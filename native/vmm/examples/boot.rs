// SPDX-License-Identifier: Apache-2.0
//! Runs one machine with its console on stdin and stdout, for tests, benchmarks and curiosity.
//!
//!     boot --kernel K [--initrd I] [--cmdline C] | --firmware CODE [--variables V] [--menu yes]
//!          [--disk FILE:FORMAT]… [--memory MiB] [--vcpus N] [--cpu MODEL] [--on-reset restart|end] [--button-on TEXT]
//!          [--time-limit S]
//!
//! Nothing is confined here. `--button-on` presses the power button once the guest has printed TEXT; SIGINT and
//! SIGTERM stop the machine in order. Events go to stderr. Exit code: 0 when the guest powered off or was stopped, 3 for any
//! other end, 2 for a machine that could not be built, 1 for a wrong command line, 4 when the time ran out.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_qcow2::Ring;
use vmbus_vmm::thread::unconfined;
use vmbus_vmm::{Config, EndReason, Event, Machine, Request};

static STOP: AtomicBool = AtomicBool::new(false);
static BUTTON: AtomicBool = AtomicBool::new(false);

struct Arguments {
    config: Value,
    button_on: Option<String>,
    time_limit: Option<Duration>,
}

fn main() -> ExitCode {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let arguments = match parse(theirs.into_raw_fd()) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("boot: {message}");
            return ExitCode::from(1);
        }
    };
    let config: Config = serde_json::from_value(arguments.config).expect("our own configuration");
    let machine = match Machine::build(config, rings(), unconfined()) {
        Ok(machine) => machine,
        Err(error) => {
            eprintln!("boot: {}: {error}", error.kind.as_str());
            return ExitCode::from(2);
        }
    };
    let output = connect_console(ours, arguments.button_on);
    stop_on_signals();
    machine.request(1, Request::Run);
    let code = follow(&machine, arguments.time_limit);
    drop(machine);
    // The machine's end of the console is closed: what it wrote last is on its way.
    let _ = output.join();
    code
}

fn parse(console_fd: RawFd) -> Result<Arguments, String> {
    let mut config = json!({
        "machine_type": "vmbus-1", "uuid": "00000000-0000-4000-8000-000000000000", "vcpus": 1,
        "memory": 256u64 << 20, "cpu_model": "host", "console_fd": console_fd, "rng": true,
        "kvm_fd": open("/dev/kvm", true)?, "disks": [],
    });
    let (mut button_on, mut time_limit) = (None, None);
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        let value = words.next().ok_or(format!("{name} needs a value"))?;
        let number = || {
            value
                .parse::<u64>()
                .map_err(|_| format!("{name} {value}: no number"))
        };
        match name.as_str() {
            "--kernel" => config["kernel"]["fd"] = open(&value, false)?.into(),
            "--initrd" => config["kernel"]["initrd_fd"] = open(&value, false)?.into(),
            "--cmdline" => config["kernel"]["cmdline"] = value.into(),
            "--firmware" => config["firmware"]["code_fd"] = open(&value, false)?.into(),
            "--variables" => config["firmware"]["variables_fd"] = open(&value, true)?.into(),
            "--menu" => config["firmware"]["menu"] = (value == "yes").into(),
            "--memory" => config["memory"] = (number()? << 20).into(),
            "--vcpus" => config["vcpus"] = number()?.into(),
            "--cpu" => config["cpu_model"] = value.into(),
            "--on-reset" => config["on_reset"] = value.into(),
            "--button-on" => button_on = Some(value),
            "--time-limit" => time_limit = Some(Duration::from_secs(number()?)),
            "--disk" => {
                let disks = config["disks"].as_array_mut().expect("an array");
                disks.push(disk(&value, disks.len())?);
            }
            _ => return Err(format!("{name} is not an option")),
        }
    }
    if config.get("kernel").is_none() {
        let disks = config["disks"].as_array().into_iter().flatten();
        let boot: Vec<_> = disks
            .filter_map(|disk| Some(format!("disk/{}", disk["id"].as_str()?)))
            .collect();
        config["firmware"]["boot"] = boot.into();
    }
    Ok(Arguments {
        config,
        button_on,
        time_limit,
    })
}

fn disk(value: &str, index: usize) -> Result<Value, String> {
    let (path, format) = value
        .rsplit_once(':')
        .ok_or(format!("--disk {value}: give FILE:qcow2 or FILE:raw"))?;
    let fd = open(path, true)?;
    Ok(json!({ "id": format!("disk{index}"), "layers": [{ "fd": fd, "format": format }] }))
}

/// One, where the host has io_uring.
fn rings() -> Vec<Ring> {
    Ring::new(256, 64).into_iter().collect()
}

fn open(path: &str, write: bool) -> Result<RawFd, String> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map(IntoRawFd::into_raw_fd)
        .map_err(|e| format!("{path}: {e}"))
}

/// Two threads copy bytes; the one that writes to stdout ends with the machine.
fn connect_console(ours: UnixStream, button_on: Option<String>) -> std::thread::JoinHandle<()> {
    let mut input = ours.try_clone().expect("dup");
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = io::stdin().read(&mut bytes) {
            if input.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
    });
    let mut output = ours;
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        let mut awaited = button_on.map(|text| (text, String::new()));
        while let Ok(len @ 1..) = output.read(&mut bytes) {
            if let Some((text, printed)) = &mut awaited {
                printed.push_str(&String::from_utf8_lossy(&bytes[..len]));
                if printed.contains(text.as_str()) {
                    BUTTON.store(true, Ordering::SeqCst);
                    awaited = None;
                }
            }
            let mut stdout = io::stdout().lock();
            if stdout
                .write_all(&bytes[..len])
                .and_then(|()| stdout.flush())
                .is_err()
            {
                break;
            }
        }
    })
}

fn stop_on_signals() {
    extern "C" fn stop(_: libc::c_int) {
        STOP.store(true, Ordering::SeqCst);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        unsafe {
            libc::signal(
                signal,
                stop as extern "C" fn(libc::c_int) as libc::sighandler_t,
            )
        };
    }
}

/// Until the machine has ended.
fn follow(machine: &Machine, limit: Option<Duration>) -> ExitCode {
    let begin = Instant::now();
    loop {
        let mut poll = libc::pollfd {
            fd: machine.event_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, ours.
        unsafe { libc::poll(&mut poll, 1, 50) };
        while let Some(event) = machine.next_event() {
            match event {
                Event::Ended { reason, detail } => {
                    eprintln!("boot: ended: {} {detail}", reason.as_str());
                    return match reason {
                        EndReason::GuestPoweroff | EndReason::Stopped => ExitCode::SUCCESS,
                        _ => ExitCode::from(3),
                    };
                }
                Event::Done { result: Ok(_), .. } => {}
                event => eprintln!("boot: {event:?}"),
            }
        }
        if BUTTON.swap(false, Ordering::SeqCst) {
            machine.request(2, Request::PowerButton);
        }
        if STOP.swap(false, Ordering::SeqCst) {
            machine.request(3, Request::Stop);
        }
        if limit.is_some_and(|limit| begin.elapsed() >= limit) {
            eprintln!("boot: the time ran out");
            return ExitCode::from(4);
        }
    }
}
