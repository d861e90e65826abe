//! The grammar of a number (RFC 8259 §6). Only the byte after a number shows its end.

/// The part that was read last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NumberPart {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    ESign,
    Exponent,
}

impl NumberPart {
    pub(super) fn start(byte: u8) -> Option<Self> {
        match byte {
            b'-' => Some(NumberPart::Minus),
            b'0' => Some(NumberPart::Zero),
            b'1'..=b'9' => Some(NumberPart::Integer),
            _ => None,
        }
    }

    pub(super) fn next(self, byte: u8) -> Option<Self> {
        match (self, byte) {
            (NumberPart::Minus, b'0') => Some(NumberPart::Zero),
            (NumberPart::Minus | NumberPart::Integer, b'0'..=b'9') => Some(NumberPart::Integer),
            (NumberPart::Zero | NumberPart::Integer, b'.') => Some(NumberPart::Point),
            (NumberPart::Point | NumberPart::Fraction, b'0'..=b'9') => Some(NumberPart::Fraction),
            (NumberPart::Zero | NumberPart::Integer | NumberPart::Fraction, b'e' | b'E') => Some(NumberPart::E),
            (NumberPart::E, b'+' | b'-') => Some(NumberPart::ESign),
            (NumberPart::E | NumberPart::ESign | NumberPart::Exponent, b'0'..=b'9') => Some(NumberPart::Exponent),
            _ => None,
        }
    }

    pub(super) fn is_complete(self) -> bool {
        matches!(self, NumberPart::Zero | NumberPart::Integer | NumberPart::Fraction | NumberPart::Exponent)
    }

    pub(super) fn expected(self) -> &'static str {
        match self {
            NumberPart::E => "a digit, `+` or `-`",
            NumberPart::Minus | NumberPart::Point | NumberPart::ESign => "a digit",
            NumberPart::Zero | NumberPart::Integer | NumberPart::Fraction | NumberPart::Exponent => {
                "the rest of a number, or what follows it"
            }
        }
    }
}
