//! A ring whose peer writes anything anywhere: no panic, no packet that was not there, no read outside the ring.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use vswitch_memory::{BufferView, GuestMemory, Region};
use vswitch_ring::{RingReader, RingWriter};

const PAGES: usize = 2;

thread_local! {
    static VIEW: RefCell<Option<BufferView>> = const { RefCell::new(None) };
}

/// One sealed memfd for the whole run; the pages are in reverse order, so that the view is not one run.
fn view() -> BufferView {
    VIEW.with_borrow_mut(|slot| {
        slot.get_or_insert_with(|| {
            let size = (PAGES * 4096) as libc::off_t;
            // SAFETY: plain system calls on an fd made here; results are checked.
            let fd = unsafe {
                let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_ALLOW_SEALING);
                assert!(fd >= 0 && libc::ftruncate(fd, size) == 0);
                assert!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) == 0);
                fd
            };
            let memory = GuestMemory::new(&[Region {
                gpa: 0,
                size: size as u64,
                fd,
            }])
            .unwrap();
            memory.view(&[1, 0], 0, PAGES * 4096).unwrap()
        })
        .clone()
    })
}

fuzz_target!(|data: &[u8]| {
    let view = view();
    view.write(0, &[0; PAGES * 4096]).unwrap();
    let (Ok(mut reader), Ok(mut writer)) =
        (RingReader::new(view.clone()), RingWriter::new(view.clone()))
    else {
        return;
    };
    let mut scratch = Vec::new();
    let mut rest = data;
    while let Some((step, tail)) = rest.split_first_chunk::<4>() {
        rest = tail;
        let number = usize::from(u16::from_le_bytes([step[2], step[3]]));
        let lost = match step[0] % 8 {
            // The peer's hand: control words, then anything in the data area.
            0 => view
                .store_u32([0, 4, 8, 12, 64][usize::from(step[1]) % 5], number as u32)
                .is_err(),
            1 => view
                .store_u32(
                    [0, 4][usize::from(step[1]) % 2],
                    (number as u32) << 16 | number as u32,
                )
                .is_err(),
            2 => {
                let length = usize::from(step[1]).min(tail.len());
                let at = 4096 + number % (4096 - 256);
                rest = &tail[length..];
                view.write(at, &tail[..length]).is_err()
            }
            3 => writer
                .write_inband(
                    &[step[1]; 4096][..number % 4096],
                    number as u64,
                    step[1] & 1 != 0,
                )
                .is_err(),
            4 => writer.commit().is_err(),
            5 => match reader.next(&mut scratch) {
                Ok(Some(packet)) => {
                    assert!(packet.payload.len() + packet.header.len() + 16 <= 4096);
                    let _ = packet.validate();
                    false
                }
                Ok(None) => false,
                Err(_) => true,
            },
            6 => reader.commit().is_err(),
            _ => reader.unmask().is_err() || writer.free().is_ok_and(|free| free > 4096),
        };
        if lost {
            return;
        }
    }
});
