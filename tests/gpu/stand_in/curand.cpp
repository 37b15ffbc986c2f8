// libcurand.so.10: ONNX Runtime's CUDA provider names it among its libraries and calls nothing of it.

extern "C" int curandGetVersion(int* version) {
    *version = 10400;
    return 0;
}
