//! Reads the offsets of kernel struct fields from the running kernel's BTF (Documentation/bpf/btf.rst).
//!
//! aya relocates field accesses of C programs only, so the Rust programs get the offsets as a global.

use std::{fs, path::Path};

use penstock_common::slot::Offsets;
use thiserror::Error;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

#[derive(Debug, Error)]
pub enum BtfError {
    #[error("cannot read {VMLINUX} ({0}); the kernel needs CONFIG_DEBUG_INFO_BTF")]
    Read(#[from] std::io::Error),
    #[error("{VMLINUX} is not little-endian BTF version 1")]
    Format,
    #[error("{VMLINUX} lacks {0}")]
    Missing(&'static str),
}

/// Reads the running kernel's offsets.
pub(super) fn offsets() -> Result<Offsets, BtfError> {
    offsets_in(&fs::read(Path::new(VMLINUX))?)
}

fn offsets_in(bytes: &[u8]) -> Result<Offsets, BtfError> {
    let btf = Btf::parse(bytes).ok_or(BtfError::Format)?;
    let field = |of: &'static str, name: &'static str| {
        btf.named(KIND_STRUCT, of)
            .find_map(|id| btf.member(id, name, 0))
            .map(|bits| bits / 8)
            .ok_or(BtfError::Missing(name))
    };
    let flag = |name: &'static str| {
        let bit = btf.named(KIND_ENUM, "sock_flags").find_map(|id| btf.value(id, name));
        bit.and_then(|bit| 1u32.checked_shl(bit)).ok_or(BtfError::Missing(name))
    };
    Ok(Offsets {
        sk_wmem_queued: field("sock", "sk_wmem_queued")?,
        sk_sndbuf: field("sock", "sk_sndbuf")?,
        write_seq: field("tcp_sock", "write_seq")?,
        max_window: field("tcp_sock", "max_window")?,
        mss_cache: field("tcp_sock", "mss_cache")?,
        skb_cb: field("sk_buff", "cb")?,
        msg_sk: field("sk_msg", "sk")?,
        msg_data: field("sk_msg", "data")?,
        msg_data_end: field("sk_msg", "data_end")?,
        ops_sk: field("bpf_sock_ops_kern", "sk")?,
        skc_cookie: field("sock_common", "skc_cookie")?,
        skc_flags: field("sock_common", "skc_flags")?,
        accounts: flag("SOCK_ZEROCOPY")? | flag("SOCK_RXQ_OVFL")?,
        copied_seq: field("tcp_sock", "copied_seq")?,
        sk_user_data: field("sock", "sk_user_data")?,
        sk_socket: field("sock", "sk_socket")?,
        socket_file: field("socket", "file")?,
        file_flags: field("file", "f_flags")?,
        sk_tsflags: field("sock", "sk_tsflags")?,
        skb_head: field("sk_buff", "head")?,
        skb_end: field("sk_buff", "end")?,
        shared_flags: field("skb_shared_info", "flags")?,
        shared_nr_frags: field("skb_shared_info", "nr_frags")?,
        shared_frag_list: field("skb_shared_info", "frag_list")?,
        shared_frags: field("skb_shared_info", "frags")?,
        page_compound_head: field("page", "compound_head").unwrap_or(0),
        // The first page of a folio is the folio. If either field is missing, every page counts as shared.
        page_mapping: field("page", "compound_head").and_then(|_| field("folio", "mapping")).unwrap_or(0),
    })
}

const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;
const KIND_INT: u32 = 1;

/// Maximum depth of nested anonymous members; the kernel nests far less.
const MAX_DEPTH: u32 = 8;

struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Start of each type in `types`; ids begin at 1.
    starts: Vec<usize>,
    /// Ids of structs and enumerations.
    searched: Vec<u32>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        if bytes.get(..3)? != [0x9f, 0xeb, 1] {
            return None;
        }
        let header = u32_at(bytes, 4)? as usize;
        let section = |offset: usize, len: usize| -> Option<&'a [u8]> {
            let start = header + u32_at(bytes, offset)? as usize;
            bytes.get(start..start + u32_at(bytes, len)? as usize)
        };
        let (types, strings) = (section(8, 12)?, section(16, 20)?);
        let (mut starts, mut searched) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < types.len() {
            starts.push(at);
            let info = u32_at(types, at + 4)?;
            let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            if matches!(kind, KIND_STRUCT | KIND_ENUM) {
                searched.push(starts.len() as u32);
            }
            at += 12
                + match kind {
                    KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                    KIND_ARRAY => 12,
                    KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => members * 12,
                    KIND_ENUM | KIND_FUNC_PROTO => members * 8,
                    _ => 0,
                };
        }
        Some(Self { types, strings, starts, searched })
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let rest = self.strings.get(offset as usize..).and_then(|rest| rest.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }

    fn info(&self, id: u32) -> Option<(usize, u32)> {
        let start = *self.starts.get((id as usize).checked_sub(1)?)?;
        Some((start, u32_at(self.types, start + 4)?))
    }

    /// Ids of the structs or enumerations of this name; several types may share it.
    fn named(&self, kind: u32, name: &'static str) -> impl Iterator<Item = u32> {
        self.searched.iter().copied().filter(move |&id| {
            self.info(id).is_some_and(|(start, info)| {
                info >> 24 & 0x1f == kind && u32_at(self.types, start).is_some_and(|offset| self.is_named(offset, name))
            })
        })
    }

    /// The value of an enumerator.
    fn value(&self, id: u32, name: &str) -> Option<u32> {
        let (start, info) = self.info(id)?;
        (0..(info & 0xffff) as usize).map(|n| start + 12 + n * 8).find_map(|at| {
            let is_it = self.is_named(u32_at(self.types, at)?, name);
            if is_it { u32_at(self.types, at + 4) } else { None }
        })
    }

    /// Offset of a member in bits; searches anonymous structs and unions too.
    fn member(&self, id: u32, name: &str, depth: u32) -> Option<u32> {
        let (start, info) = self.info(id)?;
        if !matches!(info >> 24 & 0x1f, KIND_STRUCT | KIND_UNION) || depth > MAX_DEPTH {
            return None;
        }
        // With kind_flag, the upper byte of the offset is the size of a bit field.
        let mask = if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
        (0..(info & 0xffff) as usize).find_map(|n| {
            let at = start + 12 + n * 12;
            let offset = u32_at(self.types, at + 8)? & mask;
            let found = u32_at(self.types, at)?;
            if self.is_named(found, "") {
                return self.member(u32_at(self.types, at + 4)?, name, depth + 1).map(|inner| offset + inner);
            }
            if self.is_named(found, name) { Some(offset) } else { None }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_kernel_has_all_fields() {
        let offsets = offsets().expect("BTF of the running kernel");
        assert!(offsets.sk_wmem_queued > 0 && offsets.sk_sndbuf > 0);
        // tcp_sock begins with struct sock, so write_seq lies after it.
        assert!(offsets.write_seq > offsets.sk_sndbuf);
        assert!(offsets.msg_data_end > offsets.msg_data && offsets.msg_sk > 0);
        assert!(offsets.skc_cookie > 0 && offsets.skc_cookie < offsets.sk_sndbuf);
        assert_eq!(offsets.accounts.count_ones(), 2);
        assert!(offsets.copied_seq > offsets.sk_sndbuf && offsets.sk_user_data > 0 && offsets.sk_tsflags > 0);
        assert!(offsets.shared_frags > offsets.shared_flags && offsets.shared_nr_frags > 0);
        assert!(offsets.page_mapping > 0 && offsets.page_compound_head > 0);
    }

    #[test]
    fn invalid_btf_is_refused() {
        assert!(matches!(offsets_in(b""), Err(BtfError::Format)));
        assert!(matches!(offsets_in(&[0u8; 64]), Err(BtfError::Format)));
    }
}
