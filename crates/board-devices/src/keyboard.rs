//! The keyboard on the controller's wire (IBM Personal System/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-key)"): answers what a
//! driver asks when it looks for a keyboard, and has three keys.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What a keyboard's own buffer holds. Ctrl-Alt-Del fits once and not twice.
const BUFFER_BYTES: usize = 16;

const ACKNOWLEDGED: u8 = 0xfa;
/// Not understood; say it again.
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// What every keyboard with 101 keys and more says that it is.
const ID: [u8; 2] = [0xab, 0x83];
/// The only set of scan codes that it has.
const SCAN_CODE_SET: u8 = 2;

const COMMAND_LIGHTS: u8 = 0xed;
const COMMAND_ECHO: u8 = 0xee;
const COMMAND_SCAN_CODE_SET: u8 = 0xf0;
const COMMAND_IDENTIFY: u8 = 0xf2;
const COMMAND_REPEAT_RATE: u8 = 0xf3;
const COMMAND_ENABLE: u8 = 0xf4;
const COMMAND_DISABLE: u8 = 0xf5;
const COMMAND_DEFAULTS: u8 = 0xf6;
const COMMAND_RESET: u8 = 0xff;

/// Ctrl, Alt and Del go down, and up again, in set 2.
const CTRL_ALT_DEL: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];
/// The same in set 1, into which a controller translates.
const CTRL_ALT_DEL_TRANSLATED: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// A keyboard with what it has to say and the controller has not taken yet.
#[derive(Debug, Default)]
pub(crate) struct Keyboard {
    /// To the last command. A new one clears it: a guest that reads none keeps nothing here but its last one's.
    answers: VecDeque<u8>,
    /// Of keys. Bounded by [`BUFFER_BYTES`].
    scan_codes: VecDeque<u8>,
    /// The command whose parameter comes next.
    unfinished: Option<u8>,
}

/// The saved state of a keyboard: a part of its controller's, which has the version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeyboardStateV1 {
    answers: Vec<u8>,
    scan_codes: Vec<u8>,
    unfinished: Option<u8>,
}

impl Keyboard {
    pub(crate) fn save(&self) -> KeyboardStateV1 {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            answers,
            scan_codes,
            unfinished,
        } = self;
        KeyboardStateV1 {
            answers: answers.iter().copied().collect(),
            scan_codes: scan_codes.iter().copied().collect(),
            unfinished: *unfinished,
        }
    }

    /// None: it says more than a keyboard's buffer holds.
    pub(crate) fn restored(state: KeyboardStateV1) -> Option<Self> {
        let fits = state.answers.len() <= BUFFER_BYTES && state.scan_codes.len() <= BUFFER_BYTES;
        fits.then(|| Self {
            answers: state.answers.into(),
            scan_codes: state.scan_codes.into(),
            unfinished: state.unfinished,
        })
    }

    /// Takes one byte from the driver. `translated`: the controller makes set 1 of what comes back.
    pub(crate) fn take(&mut self, byte: u8, translated: bool) {
        self.answers.clear();
        let answer: &[u8] = match (self.unfinished.take(), byte) {
            (Some(COMMAND_SCAN_CODE_SET), 0) => {
                &[ACKNOWLEDGED, translate_byte(SCAN_CODE_SET, translated)]
            }
            (Some(COMMAND_SCAN_CODE_SET), set) if set != SCAN_CODE_SET => &[RESEND],
            // Lights and rate are of no use to anybody.
            (Some(_), _) => &[ACKNOWLEDGED],
            (None, COMMAND_LIGHTS | COMMAND_SCAN_CODE_SET | COMMAND_REPEAT_RATE) => {
                self.unfinished = Some(byte);
                &[ACKNOWLEDGED]
            }
            (None, COMMAND_ECHO) => &[COMMAND_ECHO],
            (None, COMMAND_IDENTIFY) => {
                let [first, second] = ID;
                &[ACKNOWLEDGED, first, translate_byte(second, translated)]
            }
            // Whether it may send keys is a thing of the controller's interrupt: keys are pressed by an owner who looks there.
            (None, COMMAND_ENABLE | COMMAND_DISABLE | COMMAND_DEFAULTS) => &[ACKNOWLEDGED],
            (None, COMMAND_RESET) => {
                self.scan_codes.clear();
                &[ACKNOWLEDGED, SELF_TEST_PASSED]
            }
            (None, _) => &[RESEND],
        };
        self.answers.extend(answer);
    }

    /// Presses and releases Ctrl, Alt and Del. False: there is no room beside the keys that nobody has read.
    pub(crate) fn press_ctrl_alt_del(&mut self, translated: bool) -> bool {
        let codes: &[u8] = match translated {
            true => &CTRL_ALT_DEL_TRANSLATED,
            false => &CTRL_ALT_DEL,
        };
        let fits = self.scan_codes.is_empty() && codes.len() <= BUFFER_BYTES;
        if fits {
            self.scan_codes.extend(codes);
        }
        fits
    }

    /// There is something to read.
    pub(crate) fn has_byte(&self) -> bool {
        !(self.answers.is_empty() && self.scan_codes.is_empty())
    }

    /// The next byte; answers go first.
    pub(crate) fn next_byte(&mut self) -> Option<u8> {
        self.answers
            .pop_front()
            .or_else(|| self.scan_codes.pop_front())
    }
}

/// What a controller that translates makes of the few bytes that are not keys and change by it.
fn translate_byte(byte: u8, translated: bool) -> u8 {
    match (byte, translated) {
        (SCAN_CODE_SET, true) | (0x83, true) => 0x41,
        _ => byte,
    }
}
