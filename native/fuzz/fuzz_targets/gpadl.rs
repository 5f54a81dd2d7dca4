//! GPADL assembly: a conversation of length-prefixed channel messages; memory stays bounded, results keep the rules.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch_wire::gpadl::{page_count, AssembledGpadl, GpadlAssembler, MAXIMUM_PFN};
use vswitch_wire::vmbus::ChannelMessage;

fn check(gpadl: &AssembledGpadl) {
    assert!(!gpadl.ranges.is_empty() && gpadl.gpadl_id != 0);
    let mut bytes = 0;
    for range in &gpadl.ranges {
        assert!(range.byte_count > 0 && range.byte_offset < 4096);
        assert_eq!(
            range.pfns.len(),
            page_count(range.byte_offset, range.byte_count)
        );
        assert!(range.pfns.iter().all(|pfn| *pfn <= MAXIMUM_PFN));
        bytes += 8 + range.pfns.len() * 8;
    }
    assert!(bytes <= 0xFFFF);
}

fuzz_target!(|data: &[u8]| {
    let mut assembler = GpadlAssembler::new(4);
    let mut rest = data;
    while let Some((length, tail)) = rest.split_first() {
        let (message, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        let done = match ChannelMessage::parse(message) {
            Ok(ChannelMessage::GpadlHeader(header)) => assembler
                .header(
                    header.relid,
                    header.gpadl_id,
                    header.range_bytes,
                    header.range_count,
                    header.range_data,
                )
                .ok()
                .flatten(),
            Ok(ChannelMessage::GpadlBody(body)) => assembler
                .body(body.gpadl_id, body.range_data)
                .ok()
                .flatten(),
            Ok(ChannelMessage::RelidReleased(released)) => {
                assembler.discard_channel(released.relid);
                None
            }
            _ => None,
        };
        if let Some(gpadl) = done {
            check(&gpadl);
        }
        assert!(assembler.in_progress() <= 4);
    }
});
