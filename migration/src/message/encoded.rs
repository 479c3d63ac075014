//! COMPRESSED and XBZRLE: pages that do not go as they are.

use super::AddressRun;
use super::pages::{put_pages, take_pages};
use crate::codec::{DecodeError, Reader};
use crate::compression::{BLOCK_PAGES, Method};
use crate::layout::PAGE_SIZE;
use crate::xbzrle::delta;

/// The body of a COMPRESSED frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compressed {
    /// How the blocks are compressed; `None` only in one that was never decoded.
    pub method: Option<Method>,
    /// Where the pages belong.
    pub runs: Vec<AddressRun>,
    /// The CRC32 of each page, or nothing if they go without.
    pub crcs: Vec<u32>,
    /// How many bytes of the payload each block of [`BLOCK_PAGES`] pages, the last of what is
    /// left, takes. One that takes as many as its pages is not compressed.
    pub blocks: Vec<u32>,
}

/// The body of an XBZRLE frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Where the pages belong.
    pub runs: Vec<AddressRun>,
    /// The CRC32 of each page as the difference makes it, or nothing if they go without.
    pub crcs: Vec<u32>,
    /// How many bytes of the payload each page's difference takes.
    pub lengths: Vec<u16>,
}

impl Compressed {
    /// Writes the body, replacing what is in `out`.
    pub fn encode(
        method: Method,
        runs: &[AddressRun],
        crcs: &[u32],
        blocks: &[u32],
        out: &mut Vec<u8>,
    ) {
        out.clear();
        out.push(method.code());
        put_pages(runs, crcs, out);
        blocks.iter().for_each(|len| out.extend(len.to_le_bytes()));
    }

    /// Decodes a body into this, replacing what is in it; `payload_len` is that of the header, and
    /// must fit. There are checksums if the pages are `checked`. After an error it holds anything.
    pub fn decode(
        &mut self,
        body: &[u8],
        payload_len: u32,
        checked: bool,
    ) -> Result<(), DecodeError> {
        let mut reader = Reader::new(body);
        let [code] = reader.array()?;
        let method = Method::from_code(code).ok_or(DecodeError::Method(code))?;
        self.method = Some(method);
        let mut pages = take_pages(&mut reader, checked, &mut self.runs, &mut self.crcs)?;
        self.blocks.clear();
        while pages > 0 {
            let block = pages.min(BLOCK_PAGES);
            pages -= block;
            let len = reader.u32()?;
            DecodeError::within("bytes of a block", len.into(), block * PAGE_SIZE)?;
            self.blocks.push(len);
        }
        let stated = self.blocks.iter().map(|len| u64::from(*len)).sum();
        check_payload(stated, payload_len)?;
        reader.end()
    }
}

impl Differences {
    /// Writes the body, replacing what is in `out`.
    pub fn encode(runs: &[AddressRun], crcs: &[u32], lengths: &[u16], out: &mut Vec<u8>) {
        out.clear();
        put_pages(runs, crcs, out);
        lengths.iter().for_each(|len| out.extend(len.to_le_bytes()));
    }

    /// Decodes a body into this, as [`Compressed::decode`] does.
    pub fn decode(
        &mut self,
        body: &[u8],
        payload_len: u32,
        checked: bool,
    ) -> Result<(), DecodeError> {
        let mut reader = Reader::new(body);
        let pages = take_pages(&mut reader, checked, &mut self.runs, &mut self.crcs)?;
        self.lengths.clear();
        for _ in 0..pages {
            let len = reader.u16()?;
            DecodeError::within("bytes of a difference", len.into(), delta::MAX_LEN as u64)?;
            self.lengths.push(len);
        }
        let stated = self.lengths.iter().map(|len| u64::from(*len)).sum();
        check_payload(stated, payload_len)?;
        reader.end()
    }
}

fn check_payload(stated: u64, len: u32) -> Result<(), DecodeError> {
    if stated == u64::from(len) {
        Ok(())
    } else {
        Err(DecodeError::EncodedPayload { stated, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::MAX_PAGES;
    use proptest::prelude::*;

    fn run(address: u64, pages: u64) -> AddressRun {
        AddressRun { address, pages }
    }

    #[test]
    fn the_formats_are_fixed() {
        let mut body = vec![9];
        Compressed::encode(Method::Lz4, &[run(0x1000, 2)], &[1, 2], &[77], &mut body);
        let pages = [
            1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0,
        ];
        assert_eq!(body, [&[1][..], &pages, &[77, 0, 0, 0]].concat());
        let mut decoded = Compressed::default();
        decoded.decode(&body, 77, true).unwrap();
        let expected = Compressed {
            method: Some(Method::Lz4),
            runs: vec![run(0x1000, 2)],
            crcs: vec![1, 2],
            blocks: vec![77],
        };
        assert_eq!(decoded, expected);

        Differences::encode(&[run(0x1000, 2)], &[1, 2], &[12, 0], &mut body);
        assert_eq!(body, [&pages[..], &[12, 0, 0, 0]].concat());
        let mut decoded = Differences::default();
        decoded.decode(&body, 12, true).unwrap();
        assert_eq!(decoded.lengths, [12, 0]);
    }

    #[test]
    fn without_checksums_the_rest_stays() {
        let mut body = vec![];
        let runs = [run(0x1000, BLOCK_PAGES + 1)];
        Compressed::encode(Method::Zstd, &runs, &[], &[900, 80], &mut body);
        let mut decoded = Compressed::default();
        decoded.decode(&body, 980, false).unwrap();
        assert_eq!(decoded.blocks, [900, 80]);
        assert!(decoded.crcs.is_empty() && decoded.decode(&body, 980, true).is_err());
        Differences::encode(&[run(0x1000, 2)], &[], &[12, 0], &mut body);
        let mut decoded = Differences::default();
        decoded.decode(&body, 12, false).unwrap();
        assert_eq!(decoded.lengths, [12, 0]);
        assert!(decoded.crcs.is_empty() && decoded.decode(&body, 12, true).is_err());
    }

    #[test]
    fn a_body_of_most_pages_fits() {
        use crate::frame::Kind;
        let runs: Vec<_> = (0..MAX_PAGES).map(|n| run(n << 13, 1)).collect();
        let crcs = vec![0; MAX_PAGES as usize];
        let mut body = vec![];
        let blocks = vec![65536; (MAX_PAGES / BLOCK_PAGES) as usize];
        Compressed::encode(Method::Zstd, &runs, &crcs, &blocks, &mut body);
        assert_eq!(body.len(), Kind::Compressed.max_body());
        let payload = Kind::Compressed.max_payload() as u32;
        Compressed::default().decode(&body, payload, true).unwrap();
        let lengths = vec![delta::MAX_LEN as u16; MAX_PAGES as usize];
        Differences::encode(&runs, &crcs, &lengths, &mut body);
        assert_eq!(body.len(), Kind::Xbzrle.max_body());
        let payload = Kind::Xbzrle.max_payload() as u32;
        Differences::default().decode(&body, payload, true).unwrap();
    }

    #[test]
    fn lengths_that_can_not_be_are_refused() {
        let compressed = |code: u8, block: u32, payload| {
            let mut body = vec![];
            Compressed::encode(Method::Lz4, &[run(0, 2)], &[1, 2], &[block], &mut body);
            body[0] = code;
            Compressed::default()
                .decode(&body, payload, true)
                .unwrap_err()
        };
        assert_eq!(compressed(0, 77, 77), DecodeError::Method(0));
        assert_eq!(compressed(3, 77, 77), DecodeError::Method(3));
        let too_many = |what, count, limit| DecodeError::TooMany { what, count, limit };
        assert_eq!(
            compressed(1, 8193, 8193),
            too_many("bytes of a block", 8193, 8192)
        );
        let payload = |stated, len| DecodeError::EncodedPayload { stated, len };
        assert_eq!(compressed(1, 77, 78), payload(77, 78));
        let differences = |len: u16, payload| {
            let mut body = vec![];
            Differences::encode(&[run(0, 1)], &[1], &[len], &mut body);
            Differences::default()
                .decode(&body, payload, true)
                .unwrap_err()
        };
        assert_eq!(
            differences(2049, 2049),
            too_many("bytes of a difference", 2049, 2048)
        );
        assert_eq!(differences(5, 0), payload(5, 0));
        // More pages than a frame may have, and none.
        let mut body = vec![];
        Differences::encode(&[run(0, 513)], &[], &[], &mut body);
        let error = Differences::default().decode(&body, 0, true).unwrap_err();
        assert_eq!(error, too_many("pages", 513, 512));
        Differences::encode(&[run(4096, 0)], &[], &[], &mut body);
        let error = Differences::default().decode(&body, 0, true).unwrap_err();
        assert_eq!(error, DecodeError::EmptyRun(4096));
    }

    proptest! {
        #[test]
        fn anything_may_come(body in prop::collection::vec(any::<u8>(), 0..200), len: u32, checked: bool) {
            let _ = Compressed::default().decode(&body, len, checked);
            let _ = Differences::default().decode(&body, len, checked);
        }
    }
}
