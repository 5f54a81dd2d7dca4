//! RNDIS: aggregates, messages, packet headers and per-packet info.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch_wire::rndis::{Aggregate, PacketHeader, PpiIter, RndisMessage, PACKET_HEADER_SIZE};

fuzz_target!(|data: &[u8]| {
    let mut total = 0;
    for message in Aggregate::new(data) {
        let Ok(message) = message else { break };
        total += message.len();
        if let Ok(decoded) = RndisMessage::parse(message) {
            let encoded = decoded.encode();
            assert_eq!(RndisMessage::parse(&encoded), Ok(decoded));
            assert!(!decoded.show().0.is_empty());
        }
    }
    assert!(total <= data.len());
    // As the data path does it: the header from private memory, the rest known by length only.
    if let Some((first, rest)) = data.split_first() {
        let available = usize::from(*first) * 8;
        if let Ok(header) = PacketHeader::parse(rest, available) {
            assert!(header.message_length <= available);
            assert!(header.data_start >= PACKET_HEADER_SIZE && header.data_length > 0);
            assert!(header.data_start + header.data_length <= header.message_length);
            assert!(header.ppi_start >= PACKET_HEADER_SIZE);
            assert!(
                header.ppi_length == 0
                    || header.ppi_start + header.ppi_length <= header.message_length
            );
        }
        let records: usize = PpiIter::new(rest)
            .flatten()
            .map(|record| 12 + record.data.len())
            .sum();
        assert!(records <= rest.len());
    }
});
