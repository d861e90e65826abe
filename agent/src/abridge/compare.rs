//! Compares two JSON documents as values: white space, the order of keys and the escapes of strings do not count. Numbers are
//! compared by their text. The documents are not validated: text that is not JSON equals no document.

use std::borrow::Cow;

use crate::bbr::MAX_DEPTH;

/// What an EPP changed in a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// Nothing that counts: the documents are equal as values.
    None,
    /// Only the top-level `model`, which is this now.
    Model(String),
    /// Anything else, or one of the two is not a JSON document.
    Other,
}

/// What distinguishes `returned` from `sent`.
pub fn difference(sent: &[u8], returned: &[u8]) -> Difference {
    if sent == returned {
        return Difference::None;
    }
    let (Some(sent), Some(returned)) = (document(sent), document(returned)) else { return Difference::Other };
    if sent == returned {
        return Difference::None;
    }
    match (sent, returned) {
        (JsonValue::Object(mut sent), JsonValue::Object(mut returned)) => {
            let (Some(_), Some(model)) = (take_model(&mut sent), take_model(&mut returned)) else {
                return Difference::Other;
            };
            if sent == returned { Difference::Model(model) } else { Difference::Other }
        }
        _ => Difference::Other,
    }
}

/// Takes `model` out of these members, if it is there once and a string.
fn take_model(members: &mut Vec<(Cow<'_, [u8]>, JsonValue<'_>)>) -> Option<String> {
    let is_model = |(key, _): &(Cow<'_, [u8]>, JsonValue<'_>)| **key == *b"model";
    let at = members.iter().position(is_model)?;
    let (_, JsonValue::Text(name)) = members.remove(at) else { return None };
    if members.iter().any(is_model) {
        return None;
    }
    String::from_utf8(name.into_owned()).ok()
}

#[derive(Debug, PartialEq)]
enum JsonValue<'d> {
    /// A number, `true`, `false` or `null`, by its text.
    Scalar(&'d [u8]),
    /// The characters in UTF-8. A lone surrogate takes three bytes, too.
    Text(Cow<'d, [u8]>),
    Array(Vec<JsonValue<'d>>),
    /// By key. Equal keys stay in the order of the document.
    Object(Vec<(Cow<'d, [u8]>, JsonValue<'d>)>),
}

fn document(bytes: &[u8]) -> Option<JsonValue<'_>> {
    let mut parser = Parser { rest: bytes, depth: 0 };
    let value = parser.value()?;
    parser.skip_white();
    parser.rest.is_empty().then_some(value)
}

struct Parser<'d> {
    rest: &'d [u8],
    depth: u8,
}

impl<'d> Parser<'d> {
    fn value(&mut self) -> Option<JsonValue<'d>> {
        self.skip_white();
        match self.rest.first()? {
            b'"' => self.text().map(JsonValue::Text),
            b'{' => self.list(b'}', Self::member).map(|mut members| {
                members.sort_by(|(one, _), (other, _)| one.cmp(other));
                JsonValue::Object(members)
            }),
            b'[' => self.list(b']', Self::value).map(JsonValue::Array),
            _ => self.scalar(),
        }
    }

    fn member(&mut self) -> Option<(Cow<'d, [u8]>, JsonValue<'d>)> {
        self.skip_white();
        let key = self.text()?;
        self.skip_white();
        self.expect(b':')?;
        Some((key, self.value()?))
    }

    /// Reads elements up to the closing bracket `close`.
    fn list<T>(&mut self, close: u8, element: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        self.rest = &self.rest[1..];
        let mut elements = Vec::new();
        self.skip_white();
        if self.rest.first() != Some(&close) {
            loop {
                elements.push(element(self)?);
                self.skip_white();
                if self.rest.first() == Some(&close) {
                    break;
                }
                self.expect(b',')?;
            }
        }
        self.depth -= 1;
        self.expect(close)?;
        Some(elements)
    }

    fn scalar(&mut self) -> Option<JsonValue<'d>> {
        let is_scalar = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
        let length = self.rest.iter().position(|byte| !is_scalar(byte)).unwrap_or(self.rest.len());
        let (scalar, rest) = self.rest.split_at(length);
        self.rest = rest;
        (!scalar.is_empty()).then_some(JsonValue::Scalar(scalar))
    }

    fn text(&mut self) -> Option<Cow<'d, [u8]>> {
        self.expect(b'"')?;
        let plain = self.plain()?;
        if self.rest.first() == Some(&b'"') {
            self.rest = &self.rest[1..];
            return Some(Cow::Borrowed(plain));
        }
        let mut text = plain.to_vec();
        loop {
            if self.expect(b'"').is_some() {
                return Some(Cow::Owned(text));
            }
            self.escape(&mut text)?;
            text.extend_from_slice(self.plain()?);
        }
    }

    /// Reads up to the next quote or backslash.
    fn plain(&mut self) -> Option<&'d [u8]> {
        let length = self.rest.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
        let (plain, rest) = self.rest.split_at(length);
        self.rest = rest;
        Some(plain)
    }

    fn escape(&mut self, text: &mut Vec<u8>) -> Option<()> {
        self.expect(b'\\')?;
        let (&escaped, rest) = self.rest.split_first()?;
        self.rest = rest;
        text.push(match escaped {
            b'"' | b'\\' | b'/' => escaped,
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => return self.unit(text),
            _ => return None,
        });
        Some(())
    }

    /// Reads the digits of `\uXXXX`, and the low surrogate that follows a high one.
    fn unit(&mut self, text: &mut Vec<u8>) -> Option<()> {
        let unit = self.digits()?;
        let mut pair = Self { rest: self.rest, depth: 0 };
        let low = (pair.expect(b'\\').and_then(|()| pair.expect(b'u')).and_then(|()| pair.digits()))
            .filter(|low| (0xd800..0xdc00).contains(&unit) && (0xdc00..0xe000).contains(low));
        let character = match low {
            Some(low) => {
                self.rest = pair.rest;
                char::from_u32(0x1_0000 + ((unit - 0xd800) << 10) + (low - 0xdc00))
            }
            None => char::from_u32(unit),
        };
        match character {
            Some(character) => text.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            // A lone surrogate, encoded like a character of three bytes.
            None => {
                let bytes = [0xe0 | unit >> 12, 0x80 | unit >> 6 & 0x3f, 0x80 | unit & 0x3f];
                text.extend(bytes.iter().flat_map(|&byte| u8::try_from(byte)));
            }
        }
        Some(())
    }

    fn digits(&mut self) -> Option<u32> {
        let (digits, rest) = self.rest.split_at_checked(4)?;
        self.rest = rest;
        digits.iter().try_fold(0, |unit, &digit| Some(unit << 4 | char::from(digit).to_digit(16)?))
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.rest = self.rest.strip_prefix(&[byte])?;
        Some(())
    }

    fn skip_white(&mut self) {
        self.rest = self.rest.trim_ascii_start();
    }
}
