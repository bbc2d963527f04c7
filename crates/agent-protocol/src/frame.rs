//! Frames: eight bytes of header, then the payload.
//!
//! ```text
//! byte 0     kind: 1 message, 2 data, 3 end, 4 credit; others from 128 on are passed over, the rest are errors
//! byte 1     stream: 0 none, 1 input, 2 output, 3 errors
//! bytes 2-3  zero
//! bytes 4-7  little endian: the payload's length; of a credit, the number of bytes, and there is no payload
//! ```

use crate::WINDOW_BYTES;

/// Length of a frame's header.
pub const HEADER_BYTES: usize = 8;

/// The most bytes of a stream in one frame.
pub const MAX_DATA_BYTES: usize = 64 << 10;

/// The longest message. A process may have an environment of some size; Linux itself takes 128 KiB for one word of it.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

const MESSAGE: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const CREDIT: u8 = 4;
/// Kinds from here on may be added by later versions for things that can be done without.
const OPTIONAL: u8 = 128;

/// A stream of bytes in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// To the guest.
    Input,
    /// From the guest.
    Output,
    /// From the guest, beside the output.
    Errors,
}

impl Stream {
    fn code(self) -> u8 {
        match self {
            Stream::Input => 1,
            Stream::Output => 2,
            Stream::Errors => 3,
        }
    }

    fn from_code(code: u8) -> Result<Self, FrameError> {
        match code {
            1 => Ok(Stream::Input),
            2 => Ok(Stream::Output),
            3 => Ok(Stream::Errors),
            other => Err(FrameError::Stream(other)),
        }
    }
}

/// What is said at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message: JSON (see [`Request`](crate::Request) and its neighbours).
    Message(Vec<u8>),
    /// Bytes of a stream, at most [`MAX_DATA_BYTES`].
    Data(Stream, Vec<u8>),
    /// A stream has ended.
    End(Stream),
    /// The sender of the stream's bytes may send so many more.
    Credit(Stream, u32),
}

/// Why what came is no frame. The session is over then: where the next frame begins is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Its kind is not known and may not be passed over.
    #[error("a frame of kind {0}, which protocol {protocol} does not have", protocol = crate::PROTOCOL)]
    Kind(u8),
    /// Its stream is not known.
    #[error("a frame of stream {0}; there are 1 (input), 2 (output) and 3 (errors)")]
    Stream(u8),
    /// It is longer than its kind may be.
    #[error("a frame of kind {kind} with {length} bytes; at most {limit} are allowed")]
    Length {
        /// The frame's kind.
        kind: u8,
        /// The length it has.
        length: u32,
        /// The length it may have.
        limit: usize,
    },
    /// Bytes 2 and 3 are not zero.
    #[error("a frame's bytes 2 and 3 are {0:?} instead of zero: is that the agent's protocol?")]
    Reserved([u8; 2]),
}

impl Frame {
    /// Appends the frame's bytes.
    ///
    /// # Panics
    ///
    /// If the payload is longer than its kind may be: the sender cuts data and bounds messages.
    pub fn encode(&self, into: &mut Vec<u8>) {
        match self {
            Frame::Message(json) => {
                assert!(
                    json.len() <= MAX_MESSAGE_BYTES,
                    "a message is bounded by who makes it"
                );
                header(into, MESSAGE, 0, json.len());
                into.extend_from_slice(json);
            }
            Frame::Data(stream, bytes) => Self::encode_data(*stream, bytes, into),
            Frame::End(stream) => header(into, END, stream.code(), 0),
            Frame::Credit(stream, bytes) => header(into, CREDIT, stream.code(), *bytes as usize),
        }
    }

    /// Appends a frame of data without owning its bytes.
    ///
    /// # Panics
    ///
    /// If there are more than [`MAX_DATA_BYTES`].
    pub fn encode_data(stream: Stream, bytes: &[u8], into: &mut Vec<u8>) {
        assert!(bytes.len() <= MAX_DATA_BYTES, "data is cut by who sends it");
        header(into, DATA, stream.code(), bytes.len());
        into.extend_from_slice(bytes);
    }
}

fn header(into: &mut Vec<u8>, kind: u8, stream: u8, length: usize) {
    #[expect(clippy::cast_possible_truncation, reason = "bounded above")]
    let length = (length as u32).to_le_bytes();
    into.extend_from_slice(&[kind, stream, 0, 0]);
    into.extend_from_slice(&length);
}

/// Makes frames of bytes as they come.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What has come and was not taken, from `taken` on.
    bytes: Vec<u8>,
    taken: usize,
    /// Payload of a frame to be passed over that is still to come.
    skip: usize,
}

impl Decoder {
    /// Takes bytes of the connection. Whoever takes all frames after each call leaves less than one frame here.
    pub fn push(&mut self, mut bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        bytes = &bytes[skipped..];
        if self.taken > 0 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if it has come.
    ///
    /// # Errors
    ///
    /// What came is no frame; nothing after it can be understood.
    #[expect(
        clippy::should_implement_trait,
        reason = "an end may be followed by more"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            let rest = &self.bytes[self.taken..];
            let Some((header, payload)) = rest.split_first_chunk::<HEADER_BYTES>() else {
                return Ok(None);
            };
            let [kind, stream, reserved @ .., l0, l1, l2, l3] = *header;
            let length = u32::from_le_bytes([l0, l1, l2, l3]);
            if reserved != [0, 0] {
                return Err(FrameError::Reserved(reserved));
            }
            let limit = match kind {
                MESSAGE => MAX_MESSAGE_BYTES,
                DATA => MAX_DATA_BYTES,
                END => 0,
                CREDIT => WINDOW_BYTES as usize,
                OPTIONAL.. => MAX_MESSAGE_BYTES,
                other => return Err(FrameError::Kind(other)),
            };
            if length as usize > limit {
                return Err(FrameError::Length {
                    kind,
                    length,
                    limit,
                });
            }
            if kind == CREDIT {
                self.taken += HEADER_BYTES;
                return Ok(Some(Frame::Credit(Stream::from_code(stream)?, length)));
            }
            if kind >= OPTIONAL {
                let here = payload.len().min(length as usize);
                self.skip = length as usize - here;
                self.taken += HEADER_BYTES + here;
                continue;
            }
            let Some(payload) = payload.get(..length as usize) else {
                // Before its payload is waited for.
                if kind != MESSAGE {
                    Stream::from_code(stream)?;
                }
                return Ok(None);
            };
            let frame = match kind {
                MESSAGE => Frame::Message(payload.to_vec()),
                DATA => Frame::Data(Stream::from_code(stream)?, payload.to_vec()),
                _ => Frame::End(Stream::from_code(stream)?),
            };
            self.taken += HEADER_BYTES + length as usize;
            return Ok(Some(frame));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream() -> impl Strategy<Value = Stream> {
        prop_oneof![
            Just(Stream::Input),
            Just(Stream::Output),
            Just(Stream::Errors)
        ]
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        prop_oneof![
            bytes().prop_map(Frame::Message),
            (stream(), bytes()).prop_map(|(s, b)| Frame::Data(s, b)),
            stream().prop_map(Frame::End),
            (stream(), 0..=WINDOW_BYTES).prop_map(|(s, n)| Frame::Credit(s, n)),
        ]
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            frames in proptest::collection::vec(frame(), 0..20),
            cuts in proptest::collection::vec(1..200_usize, 1..50),
            unknown in proptest::collection::vec((128..=255_u8, 0..100_usize), 0..5),
        ) {
            let mut bytes = Vec::new();
            for (at, frame) in frames.iter().enumerate() {
                if let Some((kind, length)) = unknown.get(at) {
                    header(&mut bytes, *kind, 77, *length);
                    bytes.extend(std::iter::repeat_n(9, *length));
                }
                frame.encode(&mut bytes);
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            let mut cuts = cuts.iter().cycle();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                decoder.push(now);
                while let Some(frame) = decoder.next().unwrap() {
                    seen.push(frame);
                }
                rest = later;
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::default();
            for byte in bytes {
                decoder.push(&[byte]);
                if decoder.next().is_err() {
                    break;
                }
                prop_assert!(decoder.bytes.len() <= HEADER_BYTES + MAX_MESSAGE_BYTES);
            }
        }
    }

    fn refused(header: [u8; 8]) -> FrameError {
        let mut decoder = Decoder::default();
        decoder.push(&header);
        decoder.next().unwrap_err()
    }

    #[test]
    fn lengths_are_refused_before_their_bytes_are_waited_for() {
        let too_long = |kind, limit: usize| {
            let length = u32::try_from(limit).unwrap() + 1;
            let [a, b, c, d] = length.to_le_bytes();
            let expected = FrameError::Length {
                kind,
                length,
                limit,
            };
            assert_eq!(refused([kind, 1, 0, 0, a, b, c, d]), expected);
        };
        too_long(MESSAGE, MAX_MESSAGE_BYTES);
        too_long(DATA, MAX_DATA_BYTES);
        too_long(END, 0);
        too_long(CREDIT, WINDOW_BYTES as usize);
        too_long(200, MAX_MESSAGE_BYTES);
    }

    #[test]
    fn what_is_no_frame_is_named() {
        assert_eq!(refused([0; 8]), FrameError::Kind(0));
        assert_eq!(refused([127, 0, 0, 0, 0, 0, 0, 0]), FrameError::Kind(127));
        assert_eq!(refused([DATA, 4, 0, 0, 9, 0, 0, 0]), FrameError::Stream(4));
        assert_eq!(refused([END, 0, 0, 0, 0, 0, 0, 0]), FrameError::Stream(0));
        assert_eq!(
            refused([MESSAGE, 0, 0, 1, 0, 0, 0, 0]),
            FrameError::Reserved([0, 1])
        );
    }
}
