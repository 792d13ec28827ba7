//! Owns the socket's file: where it may be, who may use it, and when an old one is replaced.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

/// Longest path of a socket: 108 bytes with the zero behind it (`sun_path`, unix(7)).
pub const PATH_BYTES_MAX: usize = 107;
/// Time that a socket which is there has to answer a connect.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Group and others may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// In this folder only the owner of a file may remove it.
const STICKY: u32 = 0o1000;

/// Why the socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path is longer than a socket's may be.
    #[error(
        "admin socket {path}: the path has {length_bytes} bytes, and that of a Unix socket at most {PATH_BYTES_MAX}; set \
         admin.socket to a shorter one"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        length_bytes: usize,
    },
    /// Another process answers there.
    #[error("admin socket {path}: another hub listens there; set admin.socket to another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else than a socket is there.
    #[error(
        "admin socket {path}: there is something else than a socket, which is left alone; move it away, or set \
             admin.socket to another path"
    )]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// Other users could put a socket of theirs in its place.
    #[error(
        "admin socket {path}: other users may write to its folder; `chmod go-w` the folder, or set admin.socket to a \
             path in a private one"
    )]
    OpenFolder {
        /// The path.
        path: PathBuf,
    },
    /// The folder belongs to somebody else.
    #[error(
        "admin socket {path}: its folder belongs to user {owner}, neither to this one ({user}) nor to root; set \
             admin.socket to a path in a folder of its own"
    )]
    ForeignFolder {
        /// The path.
        path: PathBuf,
        /// Owner of the folder.
        owner: u32,
        /// User of this process.
        user: u32,
    },
    /// The system refuses.
    #[error("admin socket {path}: {source}; give the folder rights, or set admin.socket to another path")]
    System {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// An open socket; its file is removed with it.
#[derive(Debug)]
pub struct AdminListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and number of the file, so that one that replaced it is left alone.
    file: (u64, u64),
    user: u32,
}

impl AdminListener {
    /// Opens the socket with mode 0600, in a folder that is made with mode 0700 if there is none. A socket
    /// that nobody listens at is replaced; anything else that is there is left alone.
    ///
    /// # Errors
    /// [`SocketError`] says what is in the way.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        let system = |source| SocketError::System { path: path.to_owned(), source };
        check_length(path)?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(system)?;
        let user = own_user().map_err(system)?;
        let found = fs::metadata(folder).map_err(system)?;
        if found.uid() != user && found.uid() != 0 {
            return Err(SocketError::ForeignFolder { path: path.to_owned(), owner: found.uid(), user });
        }
        if found.mode() & WRITABLE_BY_OTHERS != 0 && found.mode() & STICKY == 0 {
            return Err(SocketError::OpenFolder { path: path.to_owned() });
        }
        remove_stale(path).await?;
        let listener = UnixListener::bind(path).map_err(system)?;
        // Until this line the creation mask rules; who comes in between is asked for credentials all the same.
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(system)?;
        let made = fs::symlink_metadata(path).map_err(system)?;
        Ok(Self { listener, path: path.to_owned(), file: (made.dev(), made.ino()), user })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection of somebody who may use it; others are closed, and counted in the log.
    ///
    /// # Errors
    /// The system gives no connection.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _unnamed) = self.listener.accept().await?;
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == self.user || peer.uid() == 0 => return Ok(stream),
                Ok(peer) => tracing::warn!(
                    code = "EH1202",
                    user = peer.uid(),
                    "Another user may not use the admin socket"
                ),
                Err(error) => {
                    tracing::warn!(code = "EH1203", %error, "Who connects to the admin socket cannot be told")
                }
            }
        }
    }
}

impl Drop for AdminListener {
    fn drop(&mut self) {
        let same =
            fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if same && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(code = "EH1204", path = %self.path.display(), %error, "The admin socket cannot be removed");
        }
    }
}

/// Whether a socket may have this path.
///
/// # Errors
/// [`SocketError::TooLong`].
pub fn check_length(path: &Path) -> Result<(), SocketError> {
    let length_bytes = path.as_os_str().as_bytes().len();
    if length_bytes > PATH_BYTES_MAX {
        return Err(SocketError::TooLong { path: path.to_owned(), length_bytes });
    }
    Ok(())
}

/// The user of this process, as the kernel shows it to its peers.
fn own_user() -> io::Result<u32> {
    let (one, _other) = UnixStream::pair()?;
    Ok(one.peer_cred()?.uid())
}

/// Removes the socket of a hub that ended without doing so itself.
async fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let system = |source| SocketError::System { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NoSocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(PROBE_TIMEOUT, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(system)
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // No room in its backlog: somebody listens, who is slow.
        Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::InUse { path: path.to_owned() })
        }
        Ok(Err(error)) => Err(system(error)),
        Ok(Ok(_)) | Err(_) => Err(SocketError::InUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/edgehub/admin.sock");
        let listener = AdminListener::bind(&path).await.unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        let (_mine, theirs) = (UnixStream::connect(&path).await.unwrap(), listener.accept().await.unwrap());
        assert_eq!(theirs.peer_cred().unwrap().uid(), own_user().unwrap());
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        // As after SIGKILL: the file is there, nobody listens.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = AdminListener::bind(&path).await.unwrap();
        let second = AdminListener::bind(&path).await.unwrap_err();
        assert!(matches!(second, SocketError::InUse { .. }), "{second}");
        assert!(path.exists(), "the second hub must not remove the socket of the first");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "notes").unwrap();
        drop(listener);
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
        let file = AdminListener::bind(&path).await.unwrap_err();
        assert!(matches!(file, SocketError::NoSocket { .. }), "{file}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(PATH_BYTES_MAX));
        let error = AdminListener::bind(&long).await.unwrap_err().to_string();
        assert!(error.contains("at most 107") && error.contains("admin.socket"), "{error}");
        let open = folder.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
        let error = AdminListener::bind(&open.join("s")).await.unwrap_err();
        assert!(matches!(error, SocketError::OpenFolder { .. }), "{error}");
        fs::set_permissions(&open, Permissions::from_mode(0o1777)).unwrap();
        drop(AdminListener::bind(&open.join("s")).await.unwrap());
    }
}
