/* Owns the memory of what a loss of power would leave: loaded before the C library, it notes which changes below one
   folder were made durable, and keeps what is removed or replaced. sync_file_range makes nothing durable, so it is
   not looked at.

   EDGEHUB_POWER_FOLDER   the folder
   EDGEHUB_POWER_JOURNAL  the file for the notes, one line each:
       C <inode> <path>   a file was made               R <from> <to>   it was renamed       U <path>   it was removed
       T <inode>          its content was cut            S <inode> <bytes>   it was synced up to there
       d <thread> <path>  a sync of a directory begins   D <thread>          it has ended
   EDGEHUB_POWER_GRAVE    the folder for files that lose their name, under their inode number */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int within(const char *path) {
  const char *folder = getenv("EDGEHUB_POWER_FOLDER");
  return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static void note(const char *format, ...) {
  static int journal = -1;
  char line[2 * PATH_MAX + 64];
  int before = errno;
  if (journal < 0)
    journal = (int)syscall(SYS_openat, AT_FDCWD, getenv("EDGEHUB_POWER_JOURNAL"), O_WRONLY | O_APPEND | O_CLOEXEC);
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (syscall(SYS_write, journal, line, length) != length) abort();
  errno = before;
}

static void bury(const char *path) {
  struct stat file;
  char grave[PATH_MAX];
  if (stat(path, &file) != 0 || !S_ISREG(file.st_mode)) return;
  snprintf(grave, sizeof grave, "%s/%lu", getenv("EDGEHUB_POWER_GRAVE"), (unsigned long)file.st_ino);
  syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, grave, 0);
}

static int opened(const char *path, int flags, mode_t mode, const char *name) {
  int (*next)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
  struct stat file;
  int ours = within(path) && (flags & (O_CREAT | O_TRUNC));
  int existed = ours && stat(path, &file) == 0;
  int descriptor = next(path, flags, mode);
  if (ours && descriptor >= 0 && fstat(descriptor, &file) == 0) {
    if (!existed) note("C %lu %s\n", (unsigned long)file.st_ino, path);
    else if (flags & O_TRUNC) note("T %lu\n", (unsigned long)file.st_ino);
  }
  return descriptor;
}

#define MODE(flags, mode) \
  if ((flags) & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { mode_t mode = 0; MODE(flags, mode) return opened(path, flags, mode, "open"); }
int open64(const char *path, int flags, ...) { mode_t mode = 0; MODE(flags, mode) return opened(path, flags, mode, "open64"); }

static int synced(int descriptor, const char *name) {
  int (*next)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  struct stat file;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  /* The length before the sync: what is written meanwhile may or may not be in it. */
  if (!within(path) || fstat(descriptor, &file) != 0) return next(descriptor);
  long thread = syscall(SYS_gettid);
  if (S_ISDIR(file.st_mode)) note("d %ld %s\n", thread, path);
  int result = next(descriptor);
  if (result == 0 && S_ISDIR(file.st_mode)) note("D %ld\n", thread);
  else if (result == 0) note("S %lu %lld\n", (unsigned long)file.st_ino, (long long)file.st_size);
  return result;
}

int fsync(int descriptor) { return synced(descriptor, "fsync"); }
int fdatasync(int descriptor) { return synced(descriptor, "fdatasync"); }

int rename(const char *from, const char *to) {
  int (*next)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
  if (!within(from)) return next(from, to);
  bury(to);
  int result = next(from, to);
  if (result == 0) note("R %s %s\n", from, to);
  return result;
}

int unlink(const char *path) {
  int (*next)(const char *) = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
  if (!within(path)) return next(path);
  bury(path);
  int result = next(path);
  if (result == 0) note("U %s\n", path);
  return result;
}
