//! Door frames and what rides in them: hypercall control words and posted messages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vswitch_wire::door::DoorMessage;
use vswitch_wire::hypercall::{ControlWord, PostMessage, SignalEvent};
use vswitch_wire::vmbus::ChannelMessage;

fuzz_target!(|data: &[u8]| {
    if let Ok((sequence, message)) = DoorMessage::parse(data) {
        assert_eq!(message.encode(sequence).as_deref(), Ok(data));
        assert!(!message.show().0.is_empty());
        if let DoorMessage::Hypercall(call) = message {
            if let Ok(word) = ControlWord::parse(call.rcx) {
                assert_eq!(word.encode(), call.rcx);
            }
            let event = SignalEvent::parse(call.rdx);
            assert_eq!(u64::from(event.connection_id), call.rdx & 0xFFFF_FFFF);
        }
    }
    if let Ok(post) = PostMessage::parse(data) {
        assert!(post.payload.len() <= 240);
        assert_eq!(PostMessage::parse(&post.encode()), Ok(post));
        let _ = ChannelMessage::parse(post.payload);
    }
});
