//! New images.

use super::*;
use crate::image::{Error, NewBacking, free_space};

#[test]
fn an_existing_image_is_kept_or_refused() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        let image = create(&path, format, MIB);
        write(&image, 4096, &[5; 512]);
        drop(image);
        // The same again is the same image.
        assert_eq!(read(&create(&path, format, MIB), 4096, 512), [5; 512]);

        let refused = |format, capacity, backing: Option<&NewBacking>| {
            let before = std::fs::read(&path).unwrap();
            let error =
                Image::create(&path, format, capacity, backing, Cache::Writeback).unwrap_err();
            assert!(matches!(error, Error::Exists { .. }), "{error}");
            assert!(std::fs::read(&path).unwrap() == before);
        };
        refused(format, 2 * MIB, None);
        let other = if format == Format::Raw {
            Format::Qcow2
        } else {
            Format::Raw
        };
        refused(other, MIB, None);
        let backing = NewBacking {
            name: "base".to_owned(),
            format: Format::Raw,
        };
        if format == Format::Qcow2 {
            refused(format, MIB, Some(&backing));
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn new_images_take_little_space() {
    let (_dir, path) = dir();
    for format in [Format::Raw, Format::Qcow2] {
        let image = create(&path, format, 1 << 40);
        assert_eq!(image.capacity(), 1 << 40);
        assert!(
            image.allocated().unwrap() < 2 * MIB,
            "{format}: {}",
            image.allocated().unwrap()
        );
        assert_eq!(
            extents(&image, Scope::Chain),
            [(ExtentKind::Zero, 0, 1 << 40)]
        );
        drop(image);
        std::fs::remove_file(&path).unwrap();
    }
    assert!(free_space(&path).unwrap() > 0);
    let error = free_space(Path::new("/nowhere/at/all")).unwrap_err();
    assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
}

#[test]
fn an_image_in_use_is_not_taken_for_a_new_one() {
    let (_dir, path) = dir();
    let _held = create(&path, Format::Raw, MIB);
    let error = Image::create(&path, Format::Raw, MIB, None, Cache::Writeback).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(path.exists());
}
