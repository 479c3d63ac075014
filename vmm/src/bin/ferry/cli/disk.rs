//! `--disk`, and QEMU's `-drive`, whose options it has as far as Ferry has their like.

use devices::image::{Cache, Format};
use devices::virtio::blk::SERIAL_LEN;
use vmm::machine::config::DiskOptions;

/// The longest name: it is part of the names of saved states.
const MOST_ID: usize = 32;

/// Reads the options behind `--disk`. A comma in a path is written twice, as in QEMU.
pub(super) fn parse(text: &str) -> Result<DiskOptions, String> {
    let mut options = DiskOptions::default();
    for option in split(text) {
        let (key, value) = option
            .split_once('=')
            .ok_or_else(|| format!("{option:?} is not KEY=VALUE (file=PATH comes first)"))?;
        match key {
            "file" => options.file = value.into(),
            "format" => options.format = Some(format(value)?),
            "readonly" | "read-only" => options.readonly = on_off(key, value)?,
            "overcommit" => options.overcommit = on_off(key, value)?,
            "cache" => options.cache = cache(value)?,
            "id" => options.id = Some(id(value)?),
            "serial" if value.len() > SERIAL_LEN => {
                return Err(format!("serial={value}: at most {SERIAL_LEN} bytes"));
            }
            "serial" => options.serial = Some(value.to_owned()),
            // What ferry's disks are anyway.
            "if" if value == "virtio" || value == "none" => {}
            "media" if value == "disk" => {}
            "werror" if value == "enospc" => {}
            "rerror" if value == "report" => {}
            "if" | "media" | "werror" | "rerror" => {
                return Err(format!("{key}={value}: ferry's disks can't be that"));
            }
            _ => {
                return Err(format!(
                    "unknown option {key:?}: known are file, format, readonly, id, cache, serial and overcommit"
                ));
            }
        }
    }
    if options.file.as_os_str().is_empty() {
        return Err("the image is missing (file=PATH)".to_owned());
    }
    Ok(options)
}

/// Checks the disks together: names are unique.
pub(super) fn check(disks: &[DiskOptions]) -> Result<(), String> {
    let mut ids: Vec<_> = disks
        .iter()
        .enumerate()
        .map(|(index, disk)| disk.id(index))
        .collect();
    ids.sort();
    match ids.windows(2).find(|pair| pair.first() == pair.last()) {
        Some([id, ..]) => Err(format!(
            "there are two disks with the name {id:?}: give them id="
        )),
        _ => Ok(()),
    }
}

/// The parts between commas; two commas are one in a part.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        let ends = char == ',' && chars.next_if_eq(&',').is_none();
        match parts.last_mut() {
            Some(last) if !ends => last.push(char),
            _ => parts.push(String::new()),
        }
    }
    parts
}

fn format(value: &str) -> Result<Format, String> {
    match value {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err(format!("format={value}: expected raw or qcow2")),
    }
}

fn cache(value: &str) -> Result<Cache, String> {
    match value {
        "writeback" => Ok(Cache::Writeback),
        "none" => Ok(Cache::None),
        _ => Err(format!("cache={value}: expected writeback or none")),
    }
}

fn on_off(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={value}: expected on or off")),
    }
}

/// As QEMU's names: a letter, then letters, digits and `-._`.
fn id(value: &str) -> Result<String, String> {
    let rest = value.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "-._".contains(c));
    let begins = value.starts_with(|c: char| c.is_ascii_alphabetic());
    if begins && rest.is_empty() && value.len() <= MOST_ID {
        Ok(value.to_owned())
    } else {
        Err(format!(
            "id={value}: a letter, then letters, digits, '-', '.' and '_', at most {MOST_ID}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_qemu_writes_them() {
        assert_eq!(
            parse("file=/tmp/a,,b.img,format=qcow2,readonly=on,id=root,cache=none,serial=S 1"),
            Ok(DiskOptions {
                file: "/tmp/a,b.img".into(),
                format: Some(Format::Qcow2),
                readonly: true,
                cache: Cache::None,
                id: Some("root".to_owned()),
                serial: Some("S 1".to_owned()),
                overcommit: false,
            })
        );
        assert!(parse("if=virtio,file=x,media=disk").is_ok());
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, expected) in [
            ("x.img", "\"x.img\" is not KEY=VALUE"),
            ("format=raw", "the image is missing"),
            ("file=x,format=vmdk", "expected raw or qcow2"),
            ("file=x,readonly=yes", "expected on or off"),
            ("file=x,id=1a", "a letter, then"),
            ("file=x,bus=0", "unknown option \"bus\""),
            ("file=x,if=ide", "can't be that"),
            ("file=x,serial=123456789012345678901", "at most 20 bytes"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let disk = |id: Option<&str>| DiskOptions {
            id: id.map(str::to_owned),
            ..DiskOptions::default()
        };
        assert!(check(&[disk(None), disk(None)]).is_ok());
        assert!(check(&[disk(None), disk(Some("disk0"))]).is_err());
    }
}
