//! VMBus channel messages: what decodes encodes to bytes that decode to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch_wire::vmbus::ChannelMessage;

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = ChannelMessage::parse(data) {
        let encoded = message.encode();
        assert!(encoded.len() <= 240);
        assert_eq!(ChannelMessage::parse(&encoded), Ok(message));
        assert!(!message.show().0.is_empty());
    }
});
