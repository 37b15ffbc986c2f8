// The journal: one JSON object a line, appended to the file that STAND_IN_JOURNAL names. Without it nothing is written.
//
// Every line has "thread" (the kernel's thread id) and "event" (what happened). A line goes out in one write, so that
// lines of several threads, libraries and processes never mix.
#pragma once

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace stand_in {

inline int journal_file() {
    static const int file = [] {
        const char* path = std::getenv("STAND_IN_JOURNAL");
        return path && *path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644) : -1;
    }();
    return file;
}

class Line {
public:
    explicit Line(const char* event) : on_(journal_file() >= 0) {
        if (!on_) return;
        text_.reserve(256);
        text_ = "{";
        number("thread", syscall(SYS_gettid));
        text("event", event);
    }

    Line& number(const char* name, long long value) {
        if (on_) key(name) += std::to_string(value);
        return *this;
    }

    Line& text(const char* name, const std::string& value) {
        if (!on_) return *this;
        key(name) += '"';
        for (char c : value) {
            if (c == '"' || c == '\\') text_ += '\\';
            text_ += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
        }
        text_ += '"';
        return *this;
    }

    Line& handle(const char* name, const void* value) {
        char digits[32];
        std::snprintf(digits, sizeof digits, "%p", value);
        return text(name, value ? digits : "0x0");
    }

    Line& three(const char* name, unsigned x, unsigned y, unsigned z) {
        if (on_) key(name) += "[" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + "]";
        return *this;
    }

    void write() {
        if (!on_) return;
        text_ += "}\n";
        if (::write(journal_file(), text_.data(), text_.size()) < 0) std::perror("STAND_IN_JOURNAL");
    }

private:
    std::string& key(const char* name) {
        if (text_.size() > 1) text_ += ',';
        return ((text_ += '"') += name) += "\":";
    }

    bool on_;
    std::string text_;
};

}  // namespace stand_in
