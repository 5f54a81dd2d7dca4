//! NVSP messages, as requests and as completions: what decodes encodes to bytes that decode to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch_wire::nvsp::NvspMessage;

fuzz_target!(|data: &[u8]| {
    for completion in [false, true] {
        if let Ok(message) = NvspMessage::parse(data, completion) {
            // A table may lie anywhere: do not build the gap before it.
            if matches!(message, NvspMessage::SendIndirectionTable { offset, .. } if offset > 65536)
            {
                continue;
            }
            let mut encoded = Vec::new();
            message.encode(&mut encoded, 40);
            assert!(encoded.len() >= 40);
            assert_eq!(NvspMessage::parse(&encoded, completion), Ok(message));
            assert!(!message.show().0.is_empty());
        }
    }
});
