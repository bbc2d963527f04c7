//! Any bytes as what the other side of a session sends, cut anywhere. Run in `crates/agent-protocol`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run frames -- -max_len=4096 -timeout=20`
#![no_main]

use alveole_agent_protocol::{
    Answer, Credit, Decoder, Frame, Hello, MAX_DATA_BYTES, MAX_MESSAGE_BYTES, Request, Window,
    from_json,
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut decoder = Decoder::default();
    let (mut window, mut credit) = (Window::default(), Credit::default());
    // The first byte says how the rest is cut.
    let Some((piece, bytes)) = bytes.split_first() else {
        return;
    };
    for piece in bytes.chunks(usize::from(*piece) + 1) {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(Frame::Message(json))) => {
                    assert!(json.len() <= MAX_MESSAGE_BYTES);
                    let _ = from_json::<Request>(&json, "request");
                    if let Ok(Answer::Refused(refusal)) = from_json(&json, "answer") {
                        assert!(!refusal.shown().contains('\x1b'));
                    }
                    if let Ok(hello) = from_json::<Hello>(&json, "hello") {
                        let _ = hello.agree();
                    }
                }
                Ok(Some(Frame::Data(_, data))) => {
                    assert!(data.len() <= MAX_DATA_BYTES);
                    if window.came(data.len()).is_err() {
                        return;
                    }
                    window.passed(data.len());
                }
                Ok(Some(Frame::Credit(_, bytes))) => {
                    if credit.add(bytes).is_err() {
                        return;
                    }
                }
                Ok(Some(Frame::End(_))) => {}
            }
        }
    }
});
