//! The few devices of the machine that neither KVM nor the host behind the door has: serial port, clock, power.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::clock::Cmos;
use crate::console::Output;
use crate::error::{Context, Result};

pub const SERIAL_PORT: u16 = 0x3F8;
pub const SERIAL_IRQ: u32 = 4;
pub const RESET_PORT: u16 = 0xCF9;
pub const RESET_VALUE: u8 = 0x06;
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
pub const SLEEP_TYPE_OFF: u8 = 5;
const SERIAL_LAST: u16 = SERIAL_PORT + 7;
const INTERRUPT_ENABLE: u8 = 1;
const DIVISOR_LATCH: u8 = 1 << 7;
/// Of interrupt enable: received data.
const DATA_READY: u8 = 1;
/// Of interrupt identification, in the model's own state: received data.
const DATA_PENDING: u8 = 1 << 2;
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xFE;
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
/// RESET_PORT: a reset happens when this bit rises.
const RESET_CPU: u8 = 1 << 2;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What the guest asked the machine to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Power {
    Off,
    Reset,
    /// The guest is broken: it said so, or its processor cannot go on.
    Crashed(String),
}

impl Power {
    pub fn crashed(why: impl Into<String>) -> Self {
        Self::Crashed(why.into())
    }
}

/// The serial port's interrupt line: an eventfd that KVM reads.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct SerialOutput(Arc<Output>);

impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Parts {
    serial: Serial<Line, vm_superio::serial::NoEvents, SerialOutput>,
    cmos: Cmos,
}

/// The machine's I/O ports. Any thread.
pub struct Ports {
    parts: Mutex<Parts>,
    output: Arc<Output>,
    pub serial_irq: EventFd,
}

fn new_parts(output: &Arc<Output>, serial_irq: &EventFd) -> Result<Parts> {
    let line = Line(serial_irq.try_clone().context("serial port")?);
    Ok(Parts {
        serial: Serial::new(line, SerialOutput(Arc::clone(output))),
        cmos: Cmos::default(),
    })
}

impl Ports {
    /// `output` takes what the guest writes to its serial port.
    pub fn new(output: Arc<Output>) -> Result<Self> {
        let serial_irq = EventFd::new(EFD_NONBLOCK).context("serial port")?;
        Ok(Self {
            parts: Mutex::new(new_parts(&output, &serial_irq)?),
            output,
            serial_irq,
        })
    }

    /// The devices as they are after a reset.
    pub fn reset(&self) -> Result<()> {
        *self.parts() = new_parts(&self.output, &self.serial_irq)?;
        Ok(())
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest reads; ports that nobody owns read as ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                let mut parts = self.parts();
                for byte in data {
                    *byte = parts.serial.read((port - SERIAL_PORT) as u8);
                }
            }
            CMOS_DATA => {
                let value = self.parts().cmos.read();
                data.fill(value);
            }
            SLEEP_STATUS_PORT | RESET_PORT => data.fill(0),
            _ => {}
        }
    }

    /// What the guest writes; something when it concerns the whole machine.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<Power> {
        let first = *data.first()?;
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                let mut parts = self.parts();
                for byte in data {
                    // A full receive queue in loop-back mode is the guest's own loss.
                    let _ = parts.serial.write((port - SERIAL_PORT) as u8, *byte);
                }
                None
            }
            CMOS_INDEX => {
                self.parts().cmos.select(first);
                None
            }
            KEYBOARD_COMMAND if first == KEYBOARD_RESET => Some(Power::Reset),
            RESET_PORT if first & RESET_CPU != 0 => Some(Power::Reset),
            SLEEP_CONTROL_PORT if first & SLEEP_ENABLE != 0 => {
                (first >> 2 & 7 == SLEEP_TYPE_OFF).then_some(Power::Off)
            }
            _ => None,
        }
    }

    /// Types into the serial port; gives how many bytes it took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut parts = self.parts();
        let room = parts.serial.fifo_capacity().min(bytes.len());
        let now = bytes.get(..room).unwrap_or_default();
        parts.serial.enqueue_raw_bytes(now).unwrap_or(0)
    }

    /// How many bytes wait in the serial port for the guest. If there are any it is interrupted once more: a driver takes a
    /// bounded number of bytes at a time (Linux 256) and counts on the line to stay up while there are more, but the model
    /// raises its interrupt only when bytes come in.
    pub fn remind(&self) -> usize {
        let serial = &mut self.parts().serial;
        let state = serial.state();
        if state.in_buffer.is_empty() || state.interrupt_enable & DATA_READY == 0 {
            return state.in_buffer.len();
        }
        // An interrupt that cannot be raised is tried again with the next look.
        if state.interrupt_identification & DATA_PENDING != 0 {
            // The model has raised it, but the edge may have been lost while the guest had the line masked.
            let _ = self.serial_irq.write(1);
        } else if state.line_control & DIVISOR_LATCH == 0 {
            // Enabling it anew has the model look again.
            let _ = serial.write(INTERRUPT_ENABLE, state.interrupt_enable);
        }
        state.in_buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> (Ports, Arc<Output>) {
        let output = Arc::new(Output::new().unwrap());
        (Ports::new(Arc::clone(&output)).unwrap(), output)
    }

    #[test]
    fn power() {
        let (ports, _) = ports();
        let off = SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE;
        assert_eq!(ports.write(SLEEP_CONTROL_PORT, &[off]), Some(Power::Off));
        assert_eq!(
            ports.write(SLEEP_CONTROL_PORT, &[off & !SLEEP_ENABLE]),
            None
        );
        assert_eq!(ports.write(RESET_PORT, &[RESET_VALUE]), Some(Power::Reset));
        assert_eq!(ports.write(RESET_PORT, &[2]), None);
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[0xFE]), Some(Power::Reset));
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[0x20]), None);
    }

    #[test]
    fn serial_output_and_nobodys_ports() {
        let (ports, output) = ports();
        for byte in b"boot" {
            assert_eq!(ports.write(SERIAL_PORT, &[*byte]), None);
        }
        assert_eq!(output.read_from(0).1, b"boot");
        let mut data = [0; 4];
        ports.read(0xCF8, &mut data);
        assert_eq!(data, [0xFF; 4]);
    }

    #[test]
    fn typing_is_bounded_by_the_receive_queue() {
        let (ports, _) = ports();
        let taken = ports.type_in(&[b'x'; 1000]);
        assert!(taken > 0 && taken < 1000);
        assert_eq!(ports.type_in(b"y"), 0);
        let mut byte = [0];
        ports.read(SERIAL_PORT, &mut byte);
        assert_eq!(byte, *b"x");
        assert_eq!(ports.type_in(b"y"), 1);
    }

    #[test]
    fn what_a_driver_left_in_the_queue_interrupts_it_again() {
        const INTERRUPT_IDENTIFICATION: u16 = SERIAL_PORT + 2;
        let (ports, _) = ports();
        ports.write(SERIAL_PORT + u16::from(INTERRUPT_ENABLE), &[DATA_READY]);
        assert_eq!(ports.remind(), 0, "nothing was typed");
        assert_eq!(ports.type_in(b"abc"), 3);
        assert_eq!(ports.serial_irq.read().ok(), Some(1));
        let mut identification = [0];
        ports.read(INTERRUPT_IDENTIFICATION, &mut identification);
        assert_eq!(identification[0] & 0xF, 4);
        // The driver has read as many as it takes at a time; the model's interrupt is gone.
        ports.read(SERIAL_PORT, &mut [0; 2]);
        ports.read(INTERRUPT_IDENTIFICATION, &mut identification);
        assert_eq!(identification[0] & 0xF, 1);
        assert!(ports.serial_irq.read().is_err());
        assert_eq!(ports.remind(), 1);
        assert_eq!(ports.serial_irq.read().ok(), Some(1));
        ports.read(INTERRUPT_IDENTIFICATION, &mut identification);
        assert_eq!(identification[0] & 0xF, 4);
        ports.read(SERIAL_PORT, &mut [0; 1]);
        assert_eq!(ports.remind(), 0);
    }

    #[test]
    fn an_edge_that_was_lost_is_raised_again() {
        let (ports, _) = ports();
        ports.write(SERIAL_PORT + u16::from(INTERRUPT_ENABLE), &[DATA_READY]);
        assert_eq!(ports.type_in(b"abc"), 3);
        // Raised, and lost: the guest had the line masked, and has not looked at the port since.
        assert_eq!(ports.serial_irq.read().ok(), Some(1));
        assert_eq!(ports.remind(), 3);
        assert_eq!(ports.serial_irq.read().ok(), Some(1));
        // A driver that wants no such interrupt gets none.
        ports.write(SERIAL_PORT + u16::from(INTERRUPT_ENABLE), &[0]);
        assert_eq!(ports.remind(), 3);
        assert!(ports.serial_irq.read().is_err());
    }

    #[test]
    fn no_access_panics() {
        let (ports, _) = ports();
        for port in 0..=u16::MAX {
            for value in [0u8, 0x5A, 0xFF] {
                ports.write(port, &[value; 4]);
                ports.read(port, &mut [0; 4]);
            }
            ports.write(port, &[]);
            ports.read(port, &mut []);
        }
    }
}
