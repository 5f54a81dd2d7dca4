//! `vswitch-vmm`: one virtual machine, started by the daemon with its door's listening socket.

use std::process::ExitCode;

use vswitch_vmm::args::{self, Command};
use vswitch_vmm::error::Error;
use vswitch_vmm::{failure, probe, start};

const REFUSED: u8 = 1;

fn refuse(error: &Error) -> ExitCode {
    eprintln!("vswitch-vmm: {error}");
    ExitCode::from(REFUSED)
}

fn main() -> ExitCode {
    failure::end_on_panic();
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => {
            print!("{}", args::USAGE);
            ExitCode::SUCCESS
        }
        Ok(Command::Probe) => {
            let (ok, text) = probe::report(start::open_kvm(None));
            println!("{text}");
            if ok {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(REFUSED)
            }
        }
        Ok(Command::Run(options)) => match start::run(*options) {
            Ok(end) => ExitCode::from(end as u8),
            Err(error) => refuse(&error),
        },
        Err(error) => refuse(&error),
    }
}
