//! The command line.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use lexopt::prelude::*;

use crate::calls::take_fd;
use crate::error::{Context, Error, Result};

pub const USAGE: &str = "\
Usage: vswitch-vmm --kernel-fd N --console-fd N [options]
       vswitch-vmm --probe

Runs one virtual machine. VSWITCH_DOOR_FD names the listening socket of its door; memory and processors come
with the door's HELLO. The console's output also goes to standard output.

  --kernel-fd N      the kernel, open for reading: a bzImage, or an ELF file with a 64-bit entry
  --initrd-fd N      its initial RAM disk
  --cmdline TEXT     its command line
  --console-fd N     a listening Unix stream socket: the serial console, one client at a time
  --kvm-fd N         /dev/kvm, open (default: opens it)
  --host-cpus LIST   host processors to run on, as 0,2-3 (default: all)
  --grace SECONDS    how long to go on without the host's side of the door (default: 30)
  --name NAME        the machine's name, for messages
  --probe            say as JSON whether this machine's KVM runs Hyper-V guests; status 0 if it does
";

/// What to run.
#[derive(Debug)]
pub struct Options {
    pub kernel: File,
    pub initrd: Option<File>,
    pub cmdline: String,
    pub console: OwnedFd,
    pub kvm: Option<OwnedFd>,
    pub host_cpus: Vec<usize>,
    pub grace: Duration,
    pub name: String,
}

/// What was asked for.
#[derive(Debug)]
pub enum Command {
    Run(Box<Options>),
    Probe,
    Help,
}

/// A list of processors as `0,2-3`.
pub fn parse_cpus(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last >= libc::CPU_SETSIZE as usize {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

fn descriptor(option: &str, value: OsString) -> Result<OwnedFd> {
    let number: RawFd = value.parse().context(option)?;
    take_fd(number)
        .ok_or_else(|| Error::new(format!("{option}: {number} is not an open descriptor")))
}

/// Parses what follows the program's name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let (mut kernel, mut initrd, mut console, mut kvm) = (None, None, None, None);
    let (mut cmdline, mut name) = (String::new(), String::from("vm"));
    let mut host_cpus = Vec::new();
    let mut grace = Duration::from_secs(30);
    while let Some(argument) = parser.next().context("command line")? {
        let Long(option) = argument else {
            return match argument {
                Short('h') => Ok(Command::Help),
                other => Err(Error::new(format!("command line: {}", other.unexpected()))),
            };
        };
        let option = format!("--{option}");
        if option == "--probe" {
            return Ok(Command::Probe);
        }
        if option == "--help" {
            return Ok(Command::Help);
        }
        let value = parser.value().context("command line")?;
        let text = || value.clone().string().context(&option);
        match option.as_str() {
            "--kernel-fd" => kernel = Some(File::from(descriptor(&option, value)?)),
            "--initrd-fd" => initrd = Some(File::from(descriptor(&option, value)?)),
            "--console-fd" => console = Some(descriptor(&option, value)?),
            "--kvm-fd" => kvm = Some(descriptor(&option, value)?),
            "--cmdline" => cmdline = text()?,
            "--name" => name = text()?,
            "--host-cpus" => {
                host_cpus = parse_cpus(&text()?).ok_or_else(|| {
                    Error::new("--host-cpus: give processor numbers as 0,2-3".to_owned())
                })?;
            }
            "--grace" => {
                let seconds: f64 = value.parse().context(&option)?;
                grace = Duration::try_from_secs_f64(seconds).context(&option)?;
            }
            _ => {
                return Err(Error::new(format!(
                    "command line: there is no option {option}"
                )))
            }
        }
    }
    let missing = |option| Error::new(format!("command line: {option} is missing"));
    Ok(Command::Run(Box::new(Options {
        kernel: kernel.ok_or_else(|| missing("--kernel-fd"))?,
        console: console.ok_or_else(|| missing("--console-fd"))?,
        initrd,
        cmdline,
        kvm,
        host_cpus,
        grace,
        name,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors() {
        assert_eq!(parse_cpus("0,2-3,2"), Some(vec![0, 2, 3]));
        for bad in ["", "a", "3-1", "0,", "99999999"] {
            assert_eq!(parse_cpus(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = parse([]).unwrap_err().to_string();
        assert!(error.contains("--kernel-fd"), "{error}");
        let error = parse(["--kernel-fd".into(), "987654".into()])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("987654 is not an open descriptor"),
            "{error}"
        );
        assert!(matches!(parse(["--probe".into()]), Ok(Command::Probe)));
    }
}
